"""The command line's options: the common ones, and one for every field of every method."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_origin, get_type_hints

import typer

from lmrepair.errors import UsageError
from lmrepair.failures import ANSWER, MAX_KL, read_protected
from lmrepair.methods import METHODS, Method, method_named

if TYPE_CHECKING:
    from lmrepair.failures import Failure, Reference
    from lmrepair.loop import Gate
    from lmrepair.model import Net, Progress, Statistics
    from lmrepair.patch import Patch

Failures = Annotated[
    Path,
    typer.Argument(
        metavar="FAILURES",
        help="Rows with prompt (or messages) and target, as JSON lines, a JSON array, CSV or Parquet, also in the "
        "forms of Alpaca, ShareGPT, OpenAI and others (docs/failures.md); -: standard input.",
    ),
]
PatchFile = Annotated[Path, typer.Argument(metavar="PATCH", help="A patch that lmrepair repair wrote.")]
Model = Annotated[str | None, typer.Option(help="Model folder, GGUF file or hub name; left out: the embedded model.")]
ModelFolder = Annotated[str, typer.Option("--model", help="Model folder, GGUF file or hub name.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, … or auto.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: as the checkpoint (or the patch) says.")]
Named = Annotated[str, typer.Option("--method", help=f"The method: {', '.join(METHODS)}.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of everything random.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Read the first N failures (check, fix: tasks) only.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model's repository brings.")]
Wrap = Annotated[str | None, typer.Option("--template", help=r"Wraps raw pairs, as in '# {prompt}\n{target}\n'.")]
Chat = Annotated[bool, typer.Option("--chat", help="Ask each prompt as a user's turn, in the chat template.")]
EndTurn = Annotated[
    bool, typer.Option("--end-turn/--no-end-turn", help="In chats, the target goes on to the token that ends the turn.")
]
Text = Annotated[
    Path | None, typer.Option("--reference", help="Text to measure drift on: plain, or JSON lines with text.")
]
Evaluated = Annotated[Path | None, typer.Option("--patch", help="Measure this patch on the model too.")]
Kinds = Annotated[
    list[str] | None,
    typer.Option("--reference", metavar="KIND=FILE", help="Text to measure drift on, a kind at a time; repeatable."),
]
HeldOut = Annotated[
    Path | None,
    typer.Option("--held-out", help="Other rows of the task: overfitting, and neighbours that must stay."),
]
SHIPPED = "embedded"
GridFile = Annotated[
    str | None, typer.Option("--grid", metavar="FILE", help=f"A grid of side effects; {SHIPPED}: the one that ships.")
]
NoTexts = Annotated[
    bool, typer.Option("--no-texts", help="Leave out BLEU, ROUGE-L, edit similarity (the extra bench brings them).")
]


def read_references(given: Sequence[str]) -> list[Reference]:
    """The references that ``--reference KIND=FILE`` names, a file alone by its name; without any, those that ship."""
    from lmrepair.failures import read_kinds, read_reference

    found = []
    for entry in given:
        kind, sign, path = entry.partition("=")
        if not sign:
            kind, path = Path(entry).stem, entry
        if not kind or not path:
            raise UsageError(f"--reference {entry!r}: expected KIND=FILE, as in python=src.jsonl")
        found.append(read_reference(path, kind))
    return found or read_kinds()


_GATE = "The gate: when a patch is kept"
_MAX_KL = (
    f"Most KL on the worst kind of reference text, nats per token; inf: no limit. (default {MAX_KL:g}; "
    "with --alone or --preset no gate, unless one of these three is given)"
)
_PROTECT = (
    "JSON lines with prompts that must come out as before: with a target, if greedy text gives it now; without, "
    f"the first {ANSWER} tokens (or length) of the present answer."
)
_DRIFT = (
    "quick: read reference text as far as it decides whether KL is within the limit; full: read all of it. The record "
    "says how many tokens were read."
)
_MEMORY = "An earlier patch whose repairs must still hold where they hold now; repeatable."


@dataclass(frozen=True)
class RowOptions:
    """How failures are read."""

    template: Wrap = None
    chat: Chat = False
    end_turn: EndTurn = True
    limit: Limit = None

    def read(self, path: Path) -> list[Failure]:
        from lmrepair.failures import read_failures

        return read_failures(path, self.template, self.limit, self.chat, self.end_turn)

    def read_kept(self, path: Path | None) -> Reference | list[Failure] | None:
        """What is to stay: text, or rows that are read as the failures are."""
        from lmrepair.failures import read_kept

        return read_kept(path, self.template, self.chat, self.end_turn) if path is not None else None


@dataclass(frozen=True)
class LoadOptions:
    """What a model is loaded in, and on."""

    device: Device = "auto"
    dtype: Dtype = "auto"
    seed: int = 0
    trust: Trust = False

    def for_patch(self, patch: Patch) -> LoadOptions:
        """What a patch's model is loaded in: what the user says, or what the patch was made in."""
        return self if self.dtype != "auto" else replace(self, dtype=str(patch.dtype).removeprefix("torch."))


@dataclass(frozen=True)
class SeededLoadOptions(LoadOptions):
    """The same where something random is done with the model."""

    seed: Seed = 0


@dataclass(frozen=True)
class GateOptions:
    """When a patch is kept."""

    max_kl: Annotated[float | None, typer.Option(help=_MAX_KL, rich_help_panel=_GATE, show_default=False)] = None
    protect: Annotated[Path | None, typer.Option(metavar="FILE", help=_PROTECT, rich_help_panel=_GATE)] = None
    drift: Annotated[str, typer.Option(help=_DRIFT, rich_help_panel=_GATE)] = "quick"
    memory: Annotated[list[Path] | None, typer.Option(metavar="PATCH", help=_MEMORY, rich_help_panel=_GATE)] = None


def chosen_gate(
    asked: GateOptions, reference: Path | None, default: bool, template: str | None = None, end_turn: bool = True
) -> Gate | None:
    """The gate that the options ask for; without any of them, the default one or (``default`` False) none."""
    max_kl, protect, memory = asked.max_kl, asked.protect, asked.memory or ()
    if max_kl is None and protect is None and not memory and not default:
        return None
    from lmrepair.failures import read_kinds
    from lmrepair.loop import Gate
    from lmrepair.patch import Patch

    limit = MAX_KL if max_kl is None and default else float("inf") if max_kl is None else max_kl
    protected = tuple(read_protected(protect, template, end_turn=end_turn)) if protect is not None else ()
    return Gate(limit, tuple(read_kinds(reference)), protected, tuple(Patch.load(path) for path in memory))


def chosen_statistics(
    net: Net,
    method: Method,
    kept: Reference | Sequence[Failure] | None,
    own: int | None,
    rows: Sequence[Failure],
    progress: Progress,
) -> Statistics | None:
    """Statistics of what is to stay and of ``own`` texts of the model's; None with neither: the default ones."""
    if kept is None and own is None:
        return None
    flag = "--statistics" if kept is not None else "--own-texts"
    asked = method.asks()
    if asked is None:
        having = ", ".join(name for name, one in METHODS.items() if one().asks() is not None)
        raise UsageError(f"{flag}: method {method.name!r} reads no reference text; methods that do: {having}")
    from lmrepair.model import statistics_of

    alike = asked.alike(rows) if kept is None and own else None
    return statistics_of(net, asked, kept or alike, own=own, progress=progress)


def refuse_unwritable(target: Path | None, folder: bool) -> None:
    """Find out before the work, not after it, that the result has no place to go."""
    if target is None:
        return
    if folder and target.exists() and not target.is_dir():
        raise UsageError(f"{target} is a file; with --alone, --output is the folder for one patch a failure")
    if folder and target.is_dir() and any(target.glob("*.safetensors")):
        raise UsageError(f"{target} holds patches already; with --alone, expected a folder without any")
    if not folder and target.is_dir():
        raise UsageError(f"{target} is a folder; expected the patch file to write")
    if not folder and target.exists() and not replaceable(target):
        raise UsageError(f"{target} is there and is no patch; expected a name that is free, or that of an old patch")
    above = target.absolute() if folder else target.absolute().parent
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"{target} cannot be written: {above} is no folder to write in")


def replaceable(target: Path) -> bool:
    """Whether a patch may take a file's place: nothing is lost that is no patch."""
    from lmrepair.patch import holds_patch

    return target.is_file() and (not target.stat().st_size or holds_patch(target))


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """The command that typer is given: a group among the parameters stands for its options.

    A group is a frozen dataclass: its fields with an ``Annotated`` type are the options, the others stay as they
    are. ``**settings`` stands for an option for every field of every method.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, tuple[type, list[inspect.Parameter]]] = {}
    parameters: list[inspect.Parameter] = []
    for name, given in inspect.signature(function).parameters.items():
        if given.kind is inspect.Parameter.VAR_KEYWORD:
            parameters += [_option(field, None, kind) for field, kind in _settings().items()]
        elif is_dataclass(hints[name]):
            groups[name] = hints[name], _options_of(hints[name])
            parameters += groups[name][1]
        else:
            parameters.append(_option(name, given.default, hints[name]))

    def command(**values: Any) -> None:
        made = {
            name: group(**{option.name: values.pop(option.name) for option in options})
            for name, (group, options) in groups.items()
        }
        function(**values, **made)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _options_of(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        _option(spec.name, spec.default, hints[spec.name])
        for spec in fields(group)
        if get_origin(hints[spec.name]) is Annotated
    ]


def _option(name: str, default: Any, kind: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def chosen_method(name: str, preset: str | None, seed: int, settings: Mapping[str, Any]) -> Method:
    """The method that the options name; what was not given (None) is as its preset or its defaults say."""
    given = {key: value for key, value in settings.items() if value is not None}
    method = method_named(name, preset, **given)
    random: dict[str, Any] = {"seed": seed}
    return replace(method, **random) if hasattr(method, "seed") else method


def _settings() -> dict[str, Any]:
    """Field → typer annotation, over all methods; the help gives each method's own default."""
    kinds = {"int": int, "float": float, "bool": bool, "str": str}
    defaults: dict[str, dict[str, list[str]]] = {}
    texts: dict[str, tuple[str, str]] = {}
    for method in METHODS.values():
        for spec in fields(method):
            if spec.name == "seed":  # one option for everything random
                continue
            choices = f": {', '.join(spec.metadata['choices'])}" if spec.metadata["choices"] else ""
            texts.setdefault(spec.name, (str(spec.type), spec.metadata["help"] + choices))
            defaults.setdefault(spec.name, {}).setdefault(str(spec.default), []).append(method.name)
    found = {}
    for name, (kind, text) in texts.items():
        shown = f"{text[0].upper()}{text[1:]} ({_defaults(defaults[name])})."
        option = typer.Option(help=shown, rich_help_panel="Settings of the method")
        found[name] = Annotated[kinds[kind] | None, option]
    return found


def _defaults(values: Mapping[str, Sequence[str]]) -> str:
    """Default → methods that have it, as text; what most of all methods have stands without their names."""
    most = max(values, key=lambda value: len(values[value]))
    if sum(map(len, values.values())) == len(METHODS) and len(values[most]) > len(METHODS) / 2:
        others = [f"{', '.join(names)} {value}" for value, names in values.items() if value != most]
        return "; ".join([f"default {most}", *others])
    return "; ".join(f"{', '.join(names)} {value}" for value, names in values.items())
