"""Many repairs, each alone: measured and saved in groups, so that few patches are held at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lmrepair.failures import Failure, Reference, Wordings
from lmrepair.loop.gate import Gate
from lmrepair.loop.loop import repair_each
from lmrepair.loop.outcome import Repair, with_drift
from lmrepair.measure import Drift, measure_drift
from lmrepair.methods import Method
from lmrepair.model import Net, Progress, Statistics
from lmrepair.patch import PatchSize

HELD = 1 << 30  # bytes of patches held in memory before their drift is measured


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

    ``drift`` says how a gate measures KL; what is reported is measured on all of the reference.

    Gives the repairs (without their patches), sizes and drifts of all patches made, and whether any was saved.
    """
    made: list[Repair] = []
    sizes: list[PatchSize] = []
    drifts: list[Drift] = []
    held: list[Repair] = []
    saved = 0
    for one in repair_each(net, rows, method, statistics=statistics, gate=gate, wordings=wordings, drift=drift):
        made.append(replace(one, patch=None))
        progress("repairs", len(made), len(rows))
        if one.patch is not None:
            held.append(one)
            sizes.append(PatchSize.of(one.patch))
        if held and (len(made) == len(rows) or sum(size.bytes for size in sizes[-len(held) :]) > HELD):
            patches = [item.patch for item in held if item.patch is not None]
            found = measure_drift(net, patches, reference, lambda done, total: progress("drift", done, total))
            for item, one_drift in zip(held, found, strict=True):
                patch = with_drift(item, one_drift, reference).patch
                if target is not None and item.repaired and patch is not None:
                    saved += 1
                    patch.save(target / f"{saved:04d}-{_file_name(item.outcomes[0].tokens.id)}.safetensors")
            drifts += found
            held = []
    return made, sizes, drifts, saved > 0


def _file_name(identity: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in identity)[:40]
