"""The command line: each command parses, calls one function, prints.

torch and transformers take seconds to import, so the handlers import what needs them; ``--help`` does not.
Exit status: 0 all repaired or verified, 1 something is not, 2 bad usage or input (one line on standard error).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmrepair.cli.bars import progress_bars
from lmrepair.cli.options import (
    SHIPPED,
    Device,
    Dtype,
    Evaluated,
    Failures,
    GridFile,
    HeldOut,
    Json,
    Kinds,
    Limit,
    Model,
    ModelFolder,
    NoTexts,
    Output,
    PatchFile,
    Seed,
    Text,
    Trust,
    Wrap,
    chosen_gate,
    chosen_method,
    chosen_statistics,
    read_references,
    refuse_unwritable,
    with_method_options,
)
from lmrepair.cli.render import (
    diagnosis_data,
    diagnosis_text,
    drift_text,
    patch_data,
    patch_text,
    repair_data,
    repair_text,
)
from lmrepair.cli.render_measures import measures_data, measures_text
from lmrepair.cli.study import bench, report
from lmrepair.errors import LmrepairError
from lmrepair.measure import plain, visible
from lmrepair.methods import DEFAULT

if TYPE_CHECKING:
    from lmrepair.failures import Failure
    from lmrepair.model import Net

app = typer.Typer(
    name="lmrepair",
    help="Repair language models the way engineers repair programs: failures in, a verified, reversible patch out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = 130


def main() -> None:
    """Run the command line; every expected error is one line on standard error."""
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:
            _complain("interrupted; the model is as it was")
    except LmrepairError as error:
        code = _complain(str(error))
    except typer.TyperException as error:
        text = getattr(error, "format_message", error.__str__)()
        code = _complain(f"{text} (see lmrepair --help)") if text else 2  # without arguments the help was printed
    except (KeyboardInterrupt, typer.Abort):
        code = _complain("interrupted; the model is as it was", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code or 0)


def _complain(message: str, code: int = 2) -> int:
    print(f"lmrepair: error: {visible(message, None)}", file=sys.stderr)
    return code


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"lmrepair {installed('lmrepair')}")
        raise typer.Exit


@app.command()
def demo(device: Device = "auto", as_json: Json = False) -> None:
    """Show the whole way on the model that ships: find mistakes, repair, verify, take back."""
    from lmrepair.cli.demo import run_demo

    data = run_demo(device, _silent if as_json else _show)
    if as_json:
        _print(data, [], as_json)
    raise typer.Exit(0 if data["verified"] and data["restored"] else 1)


@app.command()
def diagnose(
    failures: Failures,
    model: Model = None,
    template: Wrap = None,
    limit: Limit = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """List the mistakes a model makes on failures: where it prefers which token to the wanted one."""
    rows, net = _start(failures, template, limit, model, device, dtype, seed, trust)
    from lmrepair.diagnosis import diagnose as find

    found = find(net, rows)
    data = diagnosis_data(net.name, found, _decoder(net))
    _print(data, diagnosis_text(found, _texts(rows), _decoder(net)), as_json)
    raise typer.Exit(1 if data["failing"] else 0)


def repair(
    failures: Path,
    model: str | None = None,
    method: str = DEFAULT,
    preset: str | None = None,
    alone: bool = False,
    output: Path | None = None,
    failing: int | None = None,
    reference: Path | None = None,
    statistics: Path | None = None,
    own_texts: int | None = None,
    paraphrases: bool = False,
    prefixes: int = 0,
    max_kl: float | None = None,
    protect: Path | None = None,
    memory: list[Path] | None = None,
    template: str | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    trust: bool = False,
    as_json: bool = False,
    **settings: Any,
) -> None:
    """Repair failures and save the patch: locate the neurons, solve, check, pass the gate, measure the drift."""
    chosen = chosen_method(method, preset, seed, settings)
    target = output or (None if alone else Path(f"{failures.stem}.patch.safetensors"))
    refuse_unwritable(target, alone)
    gate = chosen_gate(max_kl, protect, memory or (), reference, template, not alone and preset is None)
    rows, net = _start(failures, template, limit, model, device, dtype, seed, trust)
    from lmrepair.diagnosis import diagnose as find
    from lmrepair.failures import read_reference
    from lmrepair.loop import drawn_wordings, repair as repair_together, repair_alone
    from lmrepair.patch import PatchSize

    text = read_reference(reference)
    known = chosen_statistics(net, chosen, statistics, own_texts)
    wordings = drawn_wordings(net, paraphrases, prefixes, seed) if paraphrases or prefixes else None
    if failing is not None:
        rows = [row for row, found in zip(rows, find(net, rows), strict=True) if found.mistakes][:failing]
    with progress_bars() as progress:
        if alone:
            repairs, sizes, drifts, saved = repair_alone(
                net, rows, chosen, text, target, progress, gate, known, wordings
            )
        else:
            repairs = [repair_together(net, rows, chosen, text, progress, known, gate, wordings)]
            patches = [one.patch for one in repairs if one.patch is not None]
            sizes = [PatchSize.of(patch) for patch in patches]
            drifts = [one.drift for one in repairs if one.drift is not None]
            for patch in patches:
                patch.save(Path(str(target)))
            saved = bool(patches)
    path = str(target) if saved and target is not None else None
    data = repair_data(net.name, repairs, sizes, drifts, path, _decoder(net))
    _print(data, repair_text(data, _texts(rows), visible(text.name)), as_json)
    raise typer.Exit(0 if _all_right(data) else 1)


def _all_right(data: dict[str, Any]) -> bool:
    return bool(data["repaired"] == data["failing"]) and not any(item["after"] for item in data["items"])


app.command(name="repair")(with_method_options(repair))


@app.command()
def evaluate(
    failures: Failures,
    model: Model = None,
    patch: Evaluated = None,
    reference: Kinds = None,
    held_out: HeldOut = None,
    grid: GridFile = None,
    no_texts: NoTexts = False,
    template: Wrap = None,
    limit: Limit = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure a model on failures, and with --patch what the patch changes: effect, side effects, drift by kind."""
    from lmrepair.failures import read_failures
    from lmrepair.measure import Material, measure, read_grid
    from lmrepair.patch import Patch

    loaded = Patch.load(patch) if patch is not None else None
    material = Material(
        read_failures(failures, template, limit),
        read_failures(held_out, template) if held_out is not None else (),
        read_references(reference or []),
        read_grid(None if grid == SHIPPED else grid) if grid is not None else None,
    )
    net = _load(model, device, dtype if loaded is None else _dtype(dtype, loaded), seed, trust)
    if loaded is not None and loaded.is_applied(net):
        loaded.revert(net)
    with progress_bars() as progress:
        found = measure(net, material, loaded, not no_texts, progress)
    path = None if patch is None else str(patch)
    data = measures_data(net.name, found, material.grid, path)
    _print(data, measures_text(data), as_json)


@app.command()
def verify(
    patch: PatchFile,
    model: Model = None,
    reference: Text = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Check on a fresh load that a patch repairs what it says, measure its drift, and take it back."""
    from lmrepair.failures import read_reference
    from lmrepair.measure import verify as check
    from lmrepair.patch import Patch

    loaded, text = Patch.load(patch), read_reference(reference)
    net = _load(model, device, _dtype(dtype, loaded), seed, trust)
    result = check(net, loaded, text)
    data = {
        "verified": result.verified,
        "model": net.name,
        "failures": len(result.diagnoses),
        "repaired": result.repaired,
        "restored": result.restored,
        "drift": plain(result.drift),
    }
    held = f"{result.repaired} of {len(result.diagnoses)} failures"
    lines = [
        f"{'verified' if result.verified else 'NOT verified'}: {held} hold under teacher forcing and in greedy text",
        f"drift      {drift_text(result.drift.kl, result.drift.agreement)} on {visible(text.name)}",
        f"taken back {'bit for bit' if result.restored else 'NOT bit for bit'}",
    ]
    _print(data, lines, as_json)
    raise typer.Exit(0 if result.verified else 1)


app.command()(bench)
app.command()(report)


@app.command()
def show(patch: PatchFile, as_json: Json = False) -> None:
    """Say what is in a patch file, after checking it."""
    from lmrepair.patch import Patch

    data = patch_data(Patch.load(patch))
    _print(data, patch_text(data), as_json)


@app.command()
def apply(
    patch: PatchFile,
    model: ModelFolder,
    output: Output,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Write a patched copy of a model folder."""
    _rewrite("apply", patch, model, output, device, dtype, trust, as_json)


@app.command()
def revert(
    patch: PatchFile,
    model: ModelFolder,
    output: Output,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Write a copy of a patched model folder with the patch taken back, bit for bit."""
    _rewrite("revert", patch, model, output, device, dtype, trust, as_json)


def _rewrite(
    verb: str, patch: Path, model: str, output: Path, device: str, dtype: str, trust: bool, as_json: bool
) -> None:
    from lmrepair.patch import Patch, refuse_existing, save_model

    loaded = Patch.load(patch)
    refuse_existing(output)
    net = _load(model, device, _dtype(dtype, loaded), 0, trust)
    getattr(loaded, verb)(net)
    save_model(net, output)
    data = {"model": net.name, "patch": str(patch), "action": verb, "output": str(output), "neurons": loaded.neurons}
    done = "applied" if verb == "apply" else "taken back, bit for bit"
    shown = visible(str(output), None)
    _print(data, [f"{done}: {loaded.neurons:,} neurons in {loaded.layers} layers → {shown}"], as_json)


def _start(
    failures: Path,
    template: str | None,
    limit: int | None,
    model: str | None,
    device: str,
    dtype: str,
    seed: int,
    trust: bool,
) -> tuple[list[Failure], Net]:
    """Read the failures first: what is wrong with them is known before a model is loaded."""
    from lmrepair.failures import read_failures

    rows = read_failures(failures, template, limit)
    return rows, _load(model, device, dtype, seed, trust)


def _load(model: str | None, device: str, dtype: str, seed: int, trust: bool) -> Net:
    import torch

    from lmrepair.model import load

    torch.manual_seed(seed)
    net = load(model, device=device, dtype=dtype, trust_remote_code=trust)
    if net.source.unread:
        shown = ", ".join(visible(name, 80) for name in net.source.unread[:3])
        more = ", …" * (len(net.source.unread) > 3)
        typer.echo(
            f"not loaded: {len(net.source.unread)} tensors that the model has no place for ({shown}{more})", err=True
        )
    return net


def _dtype(dtype: str, patch: Any) -> str:
    """What a patch's model is loaded in: what the user says, or what the patch was made in."""
    return dtype if dtype != "auto" else str(patch.dtype).removeprefix("torch.")


def _texts(rows: Sequence[Failure]) -> list[tuple[str, str]]:
    return [(row.prompt or row.messages[-1]["content"], row.target) for row in rows]


def _decoder(net: Net) -> Callable[[int], str]:
    return lambda token: str(net.tokenizer.decode([token]))


def _show(line: str) -> None:
    print(line, flush=True)


def _silent(_: str) -> None:
    pass


def _print(data: dict[str, Any], lines: Sequence[str], as_json: bool) -> None:
    if as_json:
        print(json.dumps(plain(data), ensure_ascii=False, allow_nan=False))
    else:
        for line in lines:
            print(line)


if __name__ == "__main__":
    main()
