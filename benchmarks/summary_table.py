"""The figures of a folder of results in one table, as the README shows them: the repairs made alone.

    python benchmarks/summary_table.py benchmarks/results/real conala   # one task; without, all tasks together

KL is the mean over the kinds of text named KINDS and over failures, "own form" the same on text of the task itself;
other wordings are the share of target tokens preferred after the repair, a mean over failures that have such a
wording; times are medians.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from statistics import fmean, median

from lmrepair.bench.report.results import Row, read_results

KINDS = ("python", "mixed")
WORDINGS = ("paraphrases", "context", "case")
HEADS = ("model", "method", "repaired", "forward equivalents", "KL", "own form", *WORDINGS, "patch, MB")


def main(folder: str, task: str = "") -> None:
    found = (result for result in read_results(folder) if task in ("", result.data))
    done = [result for result in found if result.study == "alone" and result.rows]
    groups: dict[tuple[str, str], list[tuple[str, Row]]] = {}
    for result in sorted(done, key=lambda one: one.order):
        groups.setdefault((result.model, result.method), []).extend((result.data, row) for row in result.rows)
    print("|", " | ".join(HEADS), "|")
    print("|" + "---|" * len(HEADS))
    for (model, method), rows in groups.items():
        print("|", " | ".join((model, method, *_figures(rows))), "|")


def _figures(found: Sequence[tuple[str, Row]]) -> list[str]:
    rows = [row for _, row in found]
    neutral = [value for kind in KINDS for value in _values(rows, f"drift.{kind}.kl")]
    own = [value for data, row in found for value in _values([row], f"drift.{data}.kl")]
    wordings = [_values(rows, f"generalisation.{one}.after.match") for one in WORDINGS]
    return [
        f"{sum(row.values.get('repaired', 0) > 0 for row in rows)} of {len(rows)}",
        f"{median(_values(rows, 'cost.forward_equivalents')):.1f}",
        f"{fmean(neutral):.4f}" if neutral else "",
        f"{fmean(own):.4f}" if own else "",
        *(f"{fmean(shares):.3f}" if shares else "" for shares in wordings),
        f"{median(_values(rows, 'patch.bytes')) / 1e6:.1f}",
    ]


def _values(rows: Sequence[Row], key: str) -> list[float]:
    return [row.values[key] for row in rows if key in row.values]


if __name__ == "__main__":
    main(*sys.argv[1:])
