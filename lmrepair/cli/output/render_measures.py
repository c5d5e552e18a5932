"""The figures of ``lmrepair evaluate`` as plain data (``--json``) and as text. Imports no model code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lmrepair.measure import plain, visible

if TYPE_CHECKING:
    from lmrepair.measure import Grid, Measures

SCORES = (
    ("token_match", "token match"),
    ("exact_match", "exact match"),
    ("greedy_match", "greedy match"),
    ("teacher_bleu", "BLEU, teacher-forced"),
    ("greedy_bleu", "BLEU, greedy"),
    ("teacher_rouge_l", "ROUGE-L, teacher-forced"),
    ("greedy_rouge_l", "ROUGE-L, greedy"),
    ("teacher_edit_similarity", "edit similarity, teacher-forced"),
    ("greedy_edit_similarity", "edit similarity, greedy"),
)


def measures_data(model: str, found: Measures, grid: Grid | None, patch: str | None) -> dict[str, Any]:
    """What ``evaluate --json`` prints; a figure that is no finite number is null."""
    data: dict[str, Any] = {
        "model": model,
        "patch": patch,
        "failures": found.before.failures,
        "patched": found.patched,
        "scores": {"before": found.before, "after": found.after},
        "match_by_failure": found.matches,
        "side_effects": found.side_effects,
        "held_out": None
        if found.held_out is None
        else {
            "before": found.held_out.before,
            "after": found.held_out.after[0] if found.held_out.after else None,
        },
        "perplexity": [
            {"kind": kind, "perplexity": drift.perplexity_before, "tokens": drift.tokens}
            for kind, drift in found.drift.items()
        ],
        "drift": [{"kind": kind, **plain(drift)} for kind, drift in found.drift.items()] if patch else [],
        "grid": None,
    }
    if found.grid is not None and grid is not None:
        data["grid"] = {
            **plain(found.grid),
            "count": len(grid.cells),
            "cells": [
                {**plain(cell), "knowledge": grid.knowledge[cell.g], "wording": grid.wordings[cell.s]}
                for cell in found.grid.cells
            ],
        }
    shown: dict[str, Any] = plain(data)
    return shown


def measures_text(data: dict[str, Any]) -> list[str]:
    """The same as lines: scores, side effects, held-out rows, the grid, drift with the worst kind first."""
    lines = [f"model      {visible(data['model'], None)}: {data['failures']} failures"]
    if data["patch"]:
        made_for = f"made for {data['patched']} of these failures"
        lines.append(f"patch      {visible(data['patch'], None)}, {made_for}")
    lines += ["", *_scores("scores", data["scores"]), *_matches(data["match_by_failure"])]
    if data["patch"] and data["side_effects"] is None:
        lines += ["", "side effects: not measured, the patch was made for none of these failures"]
    if data["side_effects"]:
        lines += ["", *_side_effects(data["side_effects"])]
    if data["held_out"]:
        lines += ["", *_scores(f"held out ({data['held_out']['before']['failures']} rows)", data["held_out"])]
    if data["grid"]:
        lines += ["", *_grid(data["grid"])]
    if data["drift"]:
        lines += ["", *_drift(data["drift"])]
    elif data["perplexity"]:
        lines += ["", *_perplexity(data["perplexity"])]
    return lines


def _scores(title: str, both: dict[str, Any]) -> list[str]:
    before, after = both["before"], both["after"]
    lines = [f"{title:32s} {'before':>9s}" + (f" {'after':>9s} {'change':>9s}" if after else "")]
    for key, name in SCORES:
        if before[key] is None:
            continue
        line = f"  {name:30s} {before[key]:9.2%}"
        if after:
            line += f" {after[key]:9.2%} {after[key] - before[key]:+9.2%}"
        lines.append(line)
    return lines


def _matches(found: dict[str, Any]) -> list[str]:
    lines = [f"  match by failure, mean with 95 % interval: {_interval(found['before'])}"]
    if found["after"]:
        lines[0] += f" → {_interval(found['after'])}, difference {_interval(found['difference'])}"
    return lines


def _interval(found: dict[str, Any]) -> str:
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


HEAD = f"{'probes':>6s}  {'match':>15s}  {'rank':>15s}  {'1/rank':>13s}  {'gap':>15s}  {'unchanged':>9s}"


def _effect(name: str, found: dict[str, Any]) -> str:
    old, new = found["before"], found["after"]
    ranks = f"{old['rank']:.1f} → {new['rank']:.1f}"
    inverse = f"{old['reciprocal_rank']:.3f} → {new['reciprocal_rank']:.3f}"
    gaps = f"{old['gap']:+.2f} → {new['gap']:+.2f}"
    match = f"{old['match']:.1%} → {new['match']:.1%}"
    cells = f"{found['probes']:6d}  {match:>15s}  {ranks:>15s}  {inverse:>13s}  {gaps:>15s}  {found['unchanged']:9.1%}"
    return f"  {visible(name, 24):24s} {cells}"


def _side_effects(found: dict[str, Any]) -> list[str]:
    lines = [f"{'generalisation':26s} {HEAD}"]
    lines += [_effect(kind, item) for kind, item in found["generalisation"].items()]
    if not found["generalisation"]:
        lines.append("  no probes")
    near = found["specificity"]
    if near is None:
        lines.append("specificity: no neighbours; give other rows of the task with --held-out")
    else:
        lines += [f"{'specificity':26s} {HEAD}", _effect("neighbours", near)]
        if near["unchanged_texts"] is not None:
            lines.append(f"  free greedy text unchanged for {near['unchanged_texts']:.1%} of the neighbours")
    if found["skipped"]:
        lines.append(f"  {found['skipped']} probes left out: the model has no room for them")
    return lines


def _grid(found: dict[str, Any]) -> list[str]:
    lines = [f"grid: {found['failing']} of {found['count']} cells failing before"]
    if found["whole"] is None:
        lines += [
            f"  {visible(name, 24):24s} match {item['match']:.1%}, mean rank {item['rank']:.1f}, gap {item['gap']:+.2f}"
            for name, item in found["wordings"].items()
        ]
        return lines
    lines.append(f"{'':26s} {HEAD}")
    lines.append(_effect("all cells", found["whole"]))
    for cell in found["cells"]:
        lines.append(f"  repaired {visible(cell['knowledge'], 40)} / {visible(cell['wording'], 24)}")
        for part, name in (("cell", "the cell"), ("row", "rest of its row"), ("column", "rest of its column")):
            lines.append(_effect(f"  {name}", cell[part]))
        lines.append(_effect("  all others", cell["elsewhere"]))
    if not found["cells"]:
        lines.append("  the patch was made for none of its cells")
    return lines


def _perplexity(kinds: Sequence[dict[str, Any]]) -> list[str]:
    ordered = sorted(kinds, key=lambda item: -math.inf if item["perplexity"] is None else -item["perplexity"])
    lines = [f"{'reference text':34s} {'perplexity':>11s} {'tokens':>8s}"]
    for item in ordered:
        lines.append(f"  {visible(item['kind'], 32):32s} {_number(item['perplexity'])} {item['tokens']:8,d}")
    return lines


def _drift(kinds: Sequence[dict[str, Any]]) -> list[str]:
    lines = [f"{'drift, worst kind first':34s} {'KL':>9s} {'agreement':>9s} {'perplexity':>23s} {'tokens':>8s}"]
    for item in kinds:
        perplexity = f"{_number(item['perplexity_before'])} → {_number(item['perplexity_after']).strip()}"
        kl = "no number" if item["kl"] is None else f"{item['kl']:9.5f}"
        lines.append(
            f"  {visible(item['kind'], 32):32s} {kl} {item['agreement']:9.2%} {perplexity:>23s} {item['tokens']:8,d}"
        )
    return lines


def _number(value: float | None) -> str:
    return f"{'beyond':>11s}" if value is None else f"{value:11.2f}" if value < 1e6 else f"{value:11.3g}"
