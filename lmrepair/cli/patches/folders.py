"""The commands ``apply`` and ``revert``: patches in model folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmrepair.cli.options import Json, LoadOptions, ModelFolder, PatchFile
from lmrepair.cli.output import show_result
from lmrepair.cli.patches.common import Copy, Force
from lmrepair.cli.starting import load_net
from lmrepair.errors import UsageError
from lmrepair.measure import visible

if TYPE_CHECKING:
    from lmrepair.patch import Patch, Rewritten

Output = Annotated[Path | None, typer.Option(help="The folder to write the model to; it must not exist yet.")]
InPlace = Annotated[bool, typer.Option("--in-place", help="Change the model folder itself, in one step.")]


@dataclass(frozen=True)
class FolderOptions:
    """Where a model folder is written, and how."""

    output: Output = None
    in_place: InPlace = False
    copy: Copy = False
    force: Force = False


def apply(
    patch: PatchFile, *, model: ModelFolder, where: FolderOptions, loading: LoadOptions, as_json: Json = False
) -> None:
    """Write a patched copy of a model folder: the bytes of the patched tensors change, every other one stays."""
    rewrite_folder("apply", patch, model, where, loading, as_json)


def revert(
    patch: PatchFile, *, model: ModelFolder, where: FolderOptions, loading: LoadOptions, as_json: Json = False
) -> None:
    """Write a copy of a patched model folder with the patch taken back, bit for bit."""
    rewrite_folder("revert", patch, model, where, loading, as_json)


def rewrite_folder(
    verb: str, path: Path, model: str, where: FolderOptions, loading: LoadOptions, as_json: bool
) -> None:
    output = where.output
    if where.in_place == (output is not None):
        raise UsageError("where to? expected --output with a folder that is not there yet, or --in-place")
    from lmrepair.patch import OtherDtypeError, Patch, Writing, folder_of, refuse_output, rewrite

    loaded = Patch.load(path)
    how = Writing(not where.copy, where.force, loading.trust)
    folder = folder_of(model)
    note = ""
    done: Rewritten | None = None
    if folder is not None and loading.dtype in ("auto", str(loaded.dtype).removeprefix("torch.")):
        try:
            done = rewrite(folder, loaded, verb == "revert", output, how)
        except OtherDtypeError as error:
            note = f"{error}: the output is written whole in the patch's dtype"
    if done is None:
        if output is None:
            raise UsageError(f"{_why_whole(model, folder, note)}, which --in-place cannot do; use --output")
        if folder is not None:
            refuse_output(folder, output, where.force)
        done = _through_memory(verb, loaded, model, output, where.force, loading)
    data = {
        "model": model, "patch": str(path), "action": verb, "output": str(done.output), "neurons": loaded.neurons,
        "tensors": done.names, "files": list(done.files), "compared": done.compared, "note": note,
    }  # fmt: skip
    took = "applied" if verb == "apply" else "taken back, bit for bit"
    shown = visible(str(done.output), None)
    lines = [f"{took}: {loaded.neurons:,} neurons in {loaded.layers} layers → {shown}"]
    lines += [f"compared   {done.compared} with the model the patch was made for"]
    if note:
        lines.append(f"note       {visible(note, None)}")
    if done.stale:
        lines.append(f"note       copied as they were, weights in them too: {visible(', '.join(done.stale), None)}")
    show_result(data, lines, as_json)


def _why_whole(model: str, folder: Path | None, note: str) -> str:
    if folder is None:
        return f"{model} is no folder of safetensors: a folder is written anew"
    return note or f"{model} is loaded in another dtype than the patch's: it is written whole"


def _through_memory(verb: str, patch: Patch, model: str, output: Path, force: bool, loading: LoadOptions) -> Rewritten:
    """The same for a model that is no folder in the patch's dtype: loaded, and written by transformers."""
    from lmrepair.patch import Rewritten, refuse_existing, save_model

    refuse_existing(output, force)
    net = load_net(model, loading.for_patch(patch))
    getattr(patch, verb)(net)
    save_model(net, output, force)
    names = {layer: tuple(stack.name for stack in net.anatomy.ffns[layer].stacks) for layer in patch.changes}
    return Rewritten(output, names, ("every file",), "every weight", ())
