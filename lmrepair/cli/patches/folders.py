"""The commands ``apply`` and ``revert``: patches in model folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmrepair.cli.options import Device, Dtype, Json, ModelFolder, PatchFile, Trust
from lmrepair.cli.output import show_result
from lmrepair.cli.patches.common import Copy, Force, load_for
from lmrepair.errors import UsageError
from lmrepair.measure import visible

if TYPE_CHECKING:
    from lmrepair.patch import Patch, Rewritten, Writing

Output = Annotated[Path | None, typer.Option(help="The folder to write the model to; it must not exist yet.")]
InPlace = Annotated[bool, typer.Option("--in-place", help="Change the model folder itself, in one step.")]


def apply(
    patch: PatchFile,
    model: ModelFolder,
    output: Output = None,
    in_place: InPlace = False,
    copy: Copy = False,
    force: Force = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Write a patched copy of a model folder: the bytes of the patched tensors change, every other one stays."""
    rewrite_folder("apply", patch, model, output, in_place, copy, force, device, dtype, trust, as_json)


def revert(
    patch: PatchFile,
    model: ModelFolder,
    output: Output = None,
    in_place: InPlace = False,
    copy: Copy = False,
    force: Force = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Write a copy of a patched model folder with the patch taken back, bit for bit."""
    rewrite_folder("revert", patch, model, output, in_place, copy, force, device, dtype, trust, as_json)


def rewrite_folder(
    verb: str,
    path: Path,
    model: str,
    output: Path | None,
    in_place: bool,
    copy: bool,
    force: bool,
    device: str,
    dtype: str,
    trust: bool,
    as_json: bool,
) -> None:
    if in_place == (output is not None):
        raise UsageError("where to? expected --output with a folder that is not there yet, or --in-place")
    from lmrepair.patch import OtherDtypeError, Patch, Writing, folder_of, rewrite

    loaded = Patch.load(path)
    how = Writing(not copy, force, trust)
    folder = folder_of(model)
    note = ""
    done: Rewritten | None = None
    if folder is not None and dtype in ("auto", str(loaded.dtype).removeprefix("torch.")):
        try:
            done = rewrite(folder, loaded, verb == "revert", output, how)
        except OtherDtypeError as error:
            note = f"{error}: the output is written whole in the patch's dtype"
    if done is None:
        if output is None:
            raise UsageError(f"{note or model + ' is no folder of safetensors'}; --in-place needs one: use --output")
        done = _through_memory(verb, loaded, model, output, how, device, dtype)
    data = {
        "model": model, "patch": str(path), "action": verb, "output": str(done.output), "neurons": loaded.neurons,
        "tensors": sorted(done.tensors.values()), "files": list(done.files), "compared": done.compared, "note": note,
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


def _through_memory(
    verb: str, patch: Patch, model: str, output: Path, how: Writing, device: str, dtype: str
) -> Rewritten:
    """The same for a model that is no folder in the patch's dtype: loaded, and written by transformers."""
    from lmrepair.patch import Rewritten, refuse_existing, save_model

    refuse_existing(output)
    net = load_for(patch, model, device, dtype, how.trust_remote_code)
    getattr(patch, verb)(net)
    save_model(net, output)
    names = {layer: f"{net.anatomy.names[layer]}.weight" for layer in patch.changes}
    return Rewritten(output, names, ("every file",), "every weight", ())
