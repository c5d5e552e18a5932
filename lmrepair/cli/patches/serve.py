"""The command ``export`` and ``verify --engine``: patches where models run."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmrepair.cli.options import Json, LoadOptions, Model, PatchFile
from lmrepair.cli.output import show_result
from lmrepair.cli.patches.common import Copy, Force, needed, untouched
from lmrepair.cli.patches.folders import FolderOptions, rewrite_folder
from lmrepair.errors import UsageError, nearest
from lmrepair.measure import visible

if TYPE_CHECKING:
    from lmrepair.model import Net
    from lmrepair.patch import Chosen, Patch

UNREAD = {"peft": ("--base", "--architecture"), "gguf": (), "merged": ("--base", "--architecture", "--rank", "--vllm")}
KINDS = tuple(UNREAD)  # what is exported; by kind, the options that say nothing there
To = Annotated[tuple[str, str], typer.Option("--to", metavar="KIND PATH", help="peft DIR, gguf FILE or merged DIR.")]
BaseFile = Annotated[Path | None, typer.Option("--base", metavar="GGUF", help="The GGUF that llama.cpp serves.")]
Architecture = Annotated[str | None, typer.Option(help="llama.cpp's name of the model's architecture, without --base.")]
Rank = Annotated[
    str | None,
    typer.Option(metavar="N", help="A rank to cut to; exact; least: at which all hold. (default: exact if it is low)"),
]
Vllm = Annotated[bool, typer.Option("--vllm", help="Pad with zeros to one rank that vLLM serves.")]
Engine = Annotated[str | None, typer.Option(help="Check in another engine: llama.cpp or peft.")]
Adapter = Annotated[Path | None, typer.Option(help="The exported adapter to check; left out: made for the purpose.")]


@dataclass(frozen=True)
class EngineOptions:
    """Which engine is asked, on which base, with which adapter."""

    engine: Engine = None
    base: BaseFile = None
    adapter: Adapter = None
    rank: Rank = None


def export(
    patch: PatchFile,
    *,
    to: To,
    model: Model = None,
    base: BaseFile = None,
    architecture: Architecture = None,
    rank: Rank = None,
    vllm: Vllm = False,
    force: Force = False,
    copy: Copy = False,
    loading: LoadOptions,
    as_json: Json = False,
) -> None:
    """Write a patch as a server takes it: a PEFT adapter, a llama.cpp LoRA (GGUF), or a merged model folder."""
    kind, output = to[0], Path(to[1])
    if kind not in KINDS:
        raise UsageError(f"--to {kind!r}: {nearest(kind, KINDS)}; expected --to KIND PATH")
    given = {"--base": base, "--architecture": architecture, "--rank": rank, "--vllm": vllm or None}
    unread = [flag for flag in UNREAD[kind] if given[flag] is not None]
    if unread:
        raise UsageError(f"--to {kind} does not read {', '.join(unread)}; leave it out")
    if kind == "merged":
        rewrite_folder("apply", patch, needed(model), FolderOptions(output, False, copy, force), loading, as_json)
        return
    from lmrepair.patch import Patch

    loaded = Patch.load(patch)
    if kind == "peft":
        from lmrepair.patch import Modules, save_peft

        net = untouched(loaded, needed(model), loading)
        made = factors_for(loaded, dict(enumerate(net.widths)), net, rank, vllm)
        save_peft(made.factors, Modules.of(net), output, force)
        size = sum(path.stat().st_size for path in output.iterdir())
        where = {"base": net.name}
    else:
        from lmrepair.patch import save_gguf

        made, name = _for_gguf(loaded, model, base, architecture, rank, vllm, loading)
        save_gguf(made.factors, name, output, force)
        size = output.stat().st_size
        where = {"architecture": name}
    data = {
        "patch": str(patch), "to": kind, "output": str(output), **where, "bytes": size, "rank": made.factors.rank,
        "ranks": {str(layer): count for layer, count in made.factors.ranks.items()}, "exact": not made.tried,
        "patch_rank": made.whole, "lost": list(made.lost),
        "tried": [{"rank": one.rank, "kept": one.kept, "of": one.claimed} for one in made.tried],
    }  # fmt: skip
    show_result(data, export_text(data), as_json)
    raise typer.Exit(1 if made.lost else 0)


def export_text(data: dict[str, Any]) -> list[str]:
    """What ``export`` prints."""
    place = visible(data["output"], None)
    lines = [f"{data['to']}       {place}: rank {data['rank']} in {len(data['ranks'])} layers, {data['bytes']:,} bytes"]
    if data["exact"]:
        lines.append("exact      the adapter's change is the patch's")
    for one in data["tried"]:
        lines.append(f"rank {one['rank']:>4}  {one['kept']} of {one['of']} failures hold")
    if data["tried"] and data["rank"] < data["patch_rank"]:
        lines.append(f"cut        from rank {data['patch_rank']}, the patch's own, to {data['rank']}")
    if data["lost"]:
        lines.append(f"lost       {visible(', '.join(data['lost']), None)}")
    return lines


def factors_for(patch: Patch, widths: dict[int, int], net: Net | None, rank: str | None, vllm: bool) -> Chosen:
    """The factors of an adapter, padded to a rank that vLLM serves where asked for."""
    from lmrepair.patch import chosen

    made = chosen(patch, widths, net, rank)
    return replace(made, factors=made.factors.served()) if vllm else made


def _for_gguf(
    patch: Patch,
    model: str | None,
    base: Path | None,
    architecture: str | None,
    rank: str | None,
    vllm: bool,
    loading: LoadOptions,
) -> tuple[Chosen, str]:
    """Factors and the base's architecture: from its GGUF, else as named, else as the model's config names it."""
    from lmrepair.patch import known_architecture, read_base

    if base is None and model is not None and is_gguf(model):
        base, model = Path(model), None
    net = untouched(patch, model, loading) if model is not None else None
    if base is not None:
        found = read_base(base, patch)
        if architecture not in (None, found.architecture):
            raise UsageError(f"--architecture {architecture!r}, but {base} says {found.architecture!r}")
        return factors_for(patch, dict(found.widths), net, rank, vllm), found.architecture
    if net is None:
        raise UsageError("a GGUF adapter needs its base: name it with --base model.gguf, or the model with --model")
    name = known_architecture(architecture or str(net.model.config.model_type))
    return factors_for(patch, dict(enumerate(net.widths)), net, rank, vllm), name


def is_gguf(path: str) -> bool:
    """Whether a file is a GGUF, by its first bytes."""
    if not Path(path).is_file():
        return False
    with Path(path).open("rb") as file:
        return file.read(4) == b"GGUF"


def verify_served(
    engine: str, path: Path, model: str | None, asked: EngineOptions, loading: LoadOptions, as_json: bool
) -> None:
    """``verify --engine``: whether the repairs hold as another engine serves the base with the patch as an adapter."""
    from lmrepair.patch import (
        ENGINES,
        Modules,
        Patch,
        answers,
        held_by_llama_cpp,
        held_over,
        holding,
        peft_on,
        save_peft,
    )

    if engine not in ENGINES:
        raise UsageError(f"unknown engine {engine!r}; {nearest(engine, ENGINES)}")
    base, adapter, rank = asked.base, asked.adapter, asked.rank
    patch = Patch.load(path)
    with tempfile.TemporaryDirectory() as folder:
        if engine == "peft":
            net = untouched(patch, needed(model), loading)
            if adapter is None:
                adapter = Path(folder) / "adapter"
                save_peft(
                    factors_for(patch, dict(enumerate(net.widths)), net, rank, False).factors, Modules.of(net), adapter
                )
            before = holding(patch, 0, *answers(net, patch))
            with peft_on(net, adapter):
                found = holding(patch, 0, *answers(net, patch))
        else:
            if base is None and model is not None and is_gguf(model):
                base, model = Path(model), None
            if base is None:
                raise UsageError("llama.cpp runs a GGUF: name the base with --base model.gguf")
            before = held_by_llama_cpp(patch, base, None)
            if adapter is not None:
                found = held_by_llama_cpp(patch, base, adapter)
            else:
                floats = untouched(patch, model, loading) if model is not None else None
                found = held_over(base, patch, floats, rank)
    data = {
        "engine": engine, "verified": not found.lost, "failures": found.claimed, "before": before.kept,
        "repaired": found.kept, "lost": list(found.lost),
    }  # fmt: skip
    lines = [
        f"{'verified' if not found.lost else 'NOT verified'}: {found.kept} of {found.claimed} repairs hold in {engine}",
        f"without    the adapter {before.kept} of them came out rightly",
    ]
    if found.lost:
        lines.append(f"lost       {visible(', '.join(found.lost), None)}")
    show_result(data, lines, as_json)
    raise typer.Exit(1 if found.lost else 0)
