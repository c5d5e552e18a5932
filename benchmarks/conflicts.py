"""Forecasts of ``lmrepair conflicts`` against what happens: small patches, all pairs of them put together.

    python benchmarks/conflicts.py model.gguf conala.dev.jsonl --output conflicts.json

The first failing rows are each repaired alone; for the first few of them there is a second patch, on purpose, that
wants another row's target for the same prompt. A failure breaks if a token of its target is not preferred any more
with the other patch beside its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from lmrepair import Failure, MinKl, Net, Patch, load, read_failures
from lmrepair.diagnosis import first_failing
from lmrepair.loop import repair_each
from lmrepair.model import settled
from lmrepair.patch import combine, forecasts

TEMPLATE = "# {prompt}\n{target}\n"
EDGES = (-8.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)  # logits of margin foretold, between the curve's points


def patches(net: Net, rows: Sequence[Failure], folder: Path | None) -> list[Patch]:
    """A patch for each row, alone, from the folder where it is there already; only those that repair."""
    found = []
    for row in rows:
        place = folder / f"{row.id}.safetensors" if folder else None
        if place is not None and place.exists():
            found.append(Patch.load(place))
            continue
        (made,) = repair_each(net, [row], MinKl())
        if made.patch is None or not made.repaired:
            continue
        found.append(made.patch)
        if place is not None:
            made.patch.save(place)
    return found


def least(net: Net, patch: Patch) -> float:
    """The least margin of a patch's failure on the net as it is, logits."""
    with settled(net.model):
        return -float(net.prefer(net.batches([item.tokens for item in patch.items])).gap.max())


def measured(net: Net, made: Sequence[Patch]) -> dict[tuple[int, int], float]:
    """(owner, other) → the owner's least margin with both on the net."""
    found = {}
    for one, other in combinations(range(len(made)), 2):
        with combine([made[one], made[other]], net).on(net):
            found[one, other], found[other, one] = least(net, made[one]), least(net, made[other])
    return found


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What breaks, what is named, and how far the two agree; the share that breaks by the margin foretold."""
    named = [row for row in rows if row["foretold"] <= 0]
    broken = [row for row in rows if row["real"] <= 0]
    right = sum(row["real"] <= 0 for row in named)
    places = torch.bucketize(torch.tensor([row["foretold"] for row in rows]), torch.tensor(EDGES))
    curve = []
    for place in range(len(EDGES) + 1):
        inside = [row["real"] <= 0 for row, at in zip(rows, places.tolist(), strict=True) if at == place]
        if inside:
            below = EDGES[place] if place < len(EDGES) else None
            curve.append({"up_to": below, "failures": len(inside), "broken": sum(inside)})
    return {
        "looked_at": len(rows), "broken": len(broken), "named": len(named), "named_and_broken": right,
        "recall": right / len(broken) if broken else None,
        "named_in_vain": (len(named) - right) / len(named) if named else None, "curve": curve,
    }  # fmt: skip


def main() -> None:
    """Make the patches, foretell, put together, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--usual", type=int, default=8, help="failing rows to repair")
    parser.add_argument("--on-purpose", type=int, default=3, help="of them, those that get a rival patch")
    parser.add_argument("--patches", type=Path, help="a folder to keep the patches in")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    net = load(given.model)
    rows = read_failures(given.rows, TEMPLATE, 4 * given.usual)
    chosen = first_failing(net, rows, given.usual)
    others = [replace(one, target=two.target) for one, two in zip(chosen, reversed(chosen), strict=True)]
    rivals = [replace(one, id=f"{one.id}-rival") for one in others[: given.on_purpose]]
    made = patches(net, [*chosen, *rivals], given.patches)
    real = measured(net, made)
    table = []
    for one in forecasts(net, made):
        pair = {one.failure, made[one.other].items[0].tokens.id}
        table.append(
            {
                "failure": one.failure, "other": made[one.other].items[0].tokens.id, "margin": one.margin,
                "foretold": one.foretold, "real": real[one.owner, one.other],
                "on_purpose": len({name.removesuffix("-rival") for name in pair}) == 1,
            }
        )  # fmt: skip
    record = {
        "model": net.name, "patches": len(made), "pairs": len(real) // 2, "all": figures(table),
        "by_chance": figures([row for row in table if not row["on_purpose"]]), "rows": table,
    }  # fmt: skip
    text = json.dumps(record, indent=1, sort_keys=True)
    if given.output:
        given.output.write_text(text + "\n", encoding="utf-8")
    print(json.dumps({name: record[name] for name in ("patches", "pairs", "all", "by_chance")}, indent=1))


if __name__ == "__main__":
    main()
