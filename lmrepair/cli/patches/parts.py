"""The commands ``compose`` and ``diff``: patches together and side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lmrepair.cli.options import Json, LoadOptions, Model, PatchFile
from lmrepair.cli.output import show_result
from lmrepair.cli.patches.common import Force, untouched
from lmrepair.errors import UsageError
from lmrepair.measure import visible

Parts = Annotated[list[Path], typer.Argument(metavar="PATCH...", help="Patches that lmrepair repair wrote.")]
Composed = Annotated[Path, typer.Option("--output", "-o", help="The patch file to write.")]
Without = Annotated[list[Path] | None, typer.Option("--without", metavar="PATCH", help="A part to take out again.")]
OtherPatch = Annotated[Path, typer.Argument(metavar="OTHER", help="Another patch.")]


def compose(
    patches: Parts,
    *,
    output: Composed,
    without_: Without = None,
    model: Model = None,
    force: Force = False,
    loading: LoadOptions,
    as_json: Json = False,
) -> None:
    """Put patches for one model together in one, or take parts out again; with --model, checked on it."""
    if output.is_dir() or (output.exists() and not force):
        raise UsageError(f"{output} exists already; expected a patch file that is not there yet (--force replaces it)")
    from lmrepair.patch import Patch, combine, held_whole, without

    parts = [Patch.load(path) for path in patches]
    net = untouched(parts[0], model, loading) if model is not None else None
    made = combine(parts, net) if len(parts) > 1 else parts[0]
    if len(parts) == 1 and not without_:
        raise UsageError("one patch to compose; expected two or more, or --without PART")
    for path in without_ or []:
        made = without(made, Patch.load(path), net)
    lost: list[str] | None = None
    if net is not None:
        lost = list(held_whole(net, made).lost)
    made.save(output)
    data = {
        "output": str(output), "parts": len(made.made.settings["parts"]), "failures": len(made.items),
        "layers": made.layers, "neurons": made.neurons, "bytes": made.size, "checked": net is not None, "lost": lost,
    }  # fmt: skip
    lines = [
        f"composed   {visible(str(output), None)}: {data['parts']} parts, {made.neurons:,} neurons",
        f"failures   {len(made.items)}"
        + ("" if net is None else f", {sum(item.repaired for item in made.items) - len(lost or [])} hold on the model"),
    ]
    if net is None:
        lines.append("note       not looked at on the model: --model checks that all repairs still hold")
    if lost:
        lines.append(f"lost       {visible(', '.join(lost), None)}")
    show_result(data, lines, as_json)
    raise typer.Exit(1 if lost else 0)


def diff(patch: PatchFile, other: OtherPatch, as_json: Json = False) -> None:
    """Say how two patches differ: neurons and norms by layer, failures in one, the other, or both."""
    from lmrepair.patch import Patch, difference

    one, two = Patch.load(patch), Patch.load(other)
    if one.dtype != two.dtype or one.width != two.width:
        raise UsageError("the patches are for models of different width or dtype; there is nothing to compare")
    ids = [{(item.tokens.prompt, item.tokens.target): item.tokens.id for item in some.items} for some in (one, two)]
    data: dict[str, Any] = {
        "same_model": one.fingerprint.body == two.fingerprint.body,
        "layers": [vars(found) for found in difference(one, two)],
        "both": sorted(ids[0][key] for key in ids[0].keys() & ids[1].keys()),
        "first": sorted(ids[0][key] for key in ids[0].keys() - ids[1].keys()),
        "second": sorted(ids[1][key] for key in ids[1].keys() - ids[0].keys()),
    }
    lines = [
        "for the same model" if data["same_model"] else "for DIFFERENT models",
        "layer  both  first  second  norms  cosine",
    ]
    for found in difference(one, two):
        cosine = "–" if found.cosine is None else f"{found.cosine:+.3f}"
        norms = f"{found.norms[0]:.4g} {found.norms[1]:.4g}"
        lines.append(f"{found.layer:>5} {found.both:>5} {found.first:>6} {found.second:>7}  {norms}  {cosine}")
    for name, what in (("both", "in both"), ("first", "in the first alone"), ("second", "in the second alone")):
        shown = visible(", ".join(data[name]), None)
        lines.append(f"failures {what}: {shown or 'none'}")
    show_result(data, lines, as_json)
