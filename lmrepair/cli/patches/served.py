"""``repair --served-as gguf``: repairs made with more and more margin, until they hold in the engine that serves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmrepair.cli.patches.serve import is_gguf
from lmrepair.errors import UsageError, nearest
from lmrepair.measure import visible

if TYPE_CHECKING:
    from lmrepair.loop import Repair
    from lmrepair.methods import Method
    from lmrepair.model import Net
    from lmrepair.patch import Patch

SERVED = ("gguf",)
ServedAs = Annotated[
    str | None,
    typer.Option(
        "--served-as",
        metavar="gguf",
        help="Try the patch in llama.cpp, as a LoRA over the GGUF that --model names; where a failure does not hold "
        "there, repair again with twice the margin, and so on.",
    ),
]


def served_base(served_as: str | None, model: str | None, alone: bool) -> Path | None:
    """The GGUF that a repair has to hold on; None where that was not asked for.

    Raises UsageError for another word, a model that is no GGUF file, --alone, and where llama.cpp is not installed.
    """
    if served_as is None:
        return None
    if served_as not in SERVED:
        raise UsageError(f"--served-as {served_as!r}: {nearest(served_as, SERVED)}")
    if alone:
        raise UsageError("--served-as tries one patch in the engine; leave --alone out")
    if model is None or not is_gguf(model):
        raise UsageError("--served-as gguf needs the GGUF file that is served: name it with --model model.gguf")
    from lmrepair.patch import llama_package

    llama_package()
    return Path(model)


def until_served(
    net: Net, base: Path, method: Method, solve: Callable[[Method], Repair]
) -> tuple[Repair, dict[str, Any]]:
    """The repair of which most holds in llama.cpp, with its patch on the net as ``solve`` leaves it, and the record.

    What is tried is a LoRA of the patch's own rank. Whatever goes wrong in between, the net is as it was.
    """
    from lmrepair.patch import MOST_MARGIN, best_of_tried, held_by_llama_cpp, held_over, until_held

    made: dict[float, Repair] = {}

    def make(margin: float) -> Patch | None:
        made[margin] = found = solve(replace(method, margin=margin))
        if found.patch is not None:
            found.patch.revert(net)
        return found.patch

    tried = until_held(make, lambda patch: held_over(base, patch, None, "exact"), method.margin)
    record: dict[str, Any] = {
        "engine": "llama.cpp", "most_margin": MOST_MARGIN,
        "tries": [{"margin": one.margin, "kept": one.held.kept, "of": one.held.claimed, "lost": list(one.held.lost)}
                  for one in tried],
    }  # fmt: skip
    if not tried:
        return made[method.margin], {**record, "margin": None, "kept": 0, "of": 0, "lost": [], "before": 0}
    best = best_of_tried(tried)
    repair, held = made[best.margin], best.held
    assert repair.patch is not None  # only patches are tried
    before = held_by_llama_cpp(repair.patch, base, None).kept
    repair.patch.apply(net)
    return repair, {
        **record, "margin": best.margin, "kept": held.kept, "of": held.claimed, "lost": list(held.lost),
        "before": before,
    }  # fmt: skip


def served_text(record: dict[str, Any]) -> list[str]:
    """The record as lines: what holds at the margin that is kept, and at each that was tried."""
    if record["margin"] is None:
        return ["served     nothing was repaired that could be tried in llama.cpp"]
    kept, of, before = record["kept"], record["of"], record["before"]
    lines = [f"served     {kept} of {of} hold in llama.cpp at margin {record['margin']:g}; {before} without the patch"]
    for one in record["tries"]:
        lost = f"; lost: {visible(', '.join(one['lost']), None)}" if one["lost"] else ""
        lines.append(f"margin {one['margin']:>4g}  {one['kept']} of {one['of']} hold{lost}")
    if record["lost"]:
        lines.append(f"           no margin up to {record['most_margin']:g} made all of them hold")
    return lines
