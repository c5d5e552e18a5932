"""Many repairs, each alone: measured and saved one by one, so that one patch is held at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lmrepair.failures import Failure, Reference, Wordings
from lmrepair.loop.gate import Gate
from lmrepair.loop.loop import repair_each
from lmrepair.loop.outcome import Repair, with_drift
from lmrepair.loop.untouched import Untouched, read_fully
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
    untouched = Untouched.of(net, [reference], read_fully(drift))
    found = repair_each(
        net, rows, method, statistics=statistics, gate=gate, wordings=wordings, drift=drift, reference=reference
    )
    for one in found:
        repair = _measured(one, untouched, reference)
        if repair.patch is not None and repair.drift is not None:
            sizes.append(PatchSize.of(repair.patch))
            drifts.append(repair.drift)
            if target is not None and repair.repaired:
                saved += 1
                repair.patch.save(target / f"{saved:04d}-{_file_name(repair.outcomes[0].tokens.id)}.safetensors")
        made.append(replace(repair, patch=None))
        progress("repairs", len(made), len(rows))
    return made, sizes, drifts, saved > 0


def _measured(repair: Repair, untouched: Untouched, reference: Reference) -> Repair:
    if repair.patch is None:
        return repair
    began = time.perf_counter()
    drift = repair.drift or untouched.measure(repair.patch).drift
    cost = replace(repair.cost, drift_seconds=time.perf_counter() - began)
    return replace(with_drift(repair, drift, reference), cost=cost)


def _file_name(identity: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in identity)[:40]
