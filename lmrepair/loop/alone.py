"""Many repairs, each alone: measured and saved one by one, so that one patch is held at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lmrepair.failures import Failure, Reference, Wordings
from lmrepair.loop.gate import Gate
from lmrepair.loop.loop import repair_each
from lmrepair.loop.outcome import Repair
from lmrepair.measure import Drift
from lmrepair.methods import Method
from lmrepair.model import Net, Progress, Statistics
from lmrepair.patch import PatchSize


def repair_alone(
    net: Net,
    rows: Sequence[Failure],
    method: Method,
    reference: Reference,
    target: Path | None,
    progress: Progress,
    gate: Gate | None = None,
    statistics: Statistics | None = None,
    wordings: Wordings | None = None,
    drift: str = "quick",
) -> tuple[list[Repair], list[PatchSize], list[Drift], bool]:
    """Repair each failure from the untouched net; patches that repair go into the folder ``target``.

    Every patch's drift is measured on ``reference``: "quick" reads the beginning of each text, "full" all of them.
    The untouched model reads them once.

    Gives the repairs (without their patches), sizes and drifts of all patches made, and whether any was saved.
    """
    made: list[Repair] = []
    sizes: list[PatchSize] = []
    drifts: list[Drift] = []
    saved = 0
    found = repair_each(
        net, rows, method, statistics=statistics, gate=gate, wordings=wordings, drift=drift, reference=reference
    )
    for repair in found:
        if repair.patch is not None and repair.drift is not None:
            sizes.append(PatchSize.of(repair.patch))
            drifts.append(repair.drift)
            if target is not None and repair.repaired:
                saved += 1
                repair.patch.save(target / f"{saved:04d}-{_file_name(repair.outcomes[0].tokens.id)}.safetensors")
        made.append(replace(repair, patch=None))
        progress("repairs", len(made), len(rows))
    return made, sizes, drifts, saved > 0


def _file_name(identity: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in identity)[:40]
