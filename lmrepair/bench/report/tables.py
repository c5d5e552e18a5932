"""The tables of the study, in the papers' order (arXiv 2503.12899), from the records of the cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmrepair.bench.report.figures import (
    NOTHING,
    Group,
    Measure,
    Shown,
    compared,
    difference,
    groups,
    number,
    ratio_of_means,
    reference,
    shown,
    times,
    worst_first,
)
from lmrepair.bench.report.results import Result, by_group
from lmrepair.measure import Interval

STATED = {"match": (0.105, 0.199), "time": (2.4, 7.0)}  # STAR against prior work, arXiv 2503.12899


@dataclass(frozen=True)
class Table:
    """A table: column titles, and blocks of (heading, rows), a row being a name and its figures."""

    columns: tuple[str, ...]
    blocks: tuple[tuple[str, tuple[tuple[str, tuple[Shown, ...]], ...]], ...]
    note: str = ""


PERCENT = 100.0
MATCH = Measure("after.teacher.token_match", "ExactMatch, tokens", PERCENT, 1, "")
TEACHER = (
    MATCH,
    Measure("after.teacher.exact", "whole target", PERCENT),
    Measure("after.teacher.bleu", "BLEU", PERCENT),
    Measure("after.teacher.rouge_l", "ROUGE-L", PERCENT),
    Measure("after.teacher.edit_similarity", "edit similarity", PERCENT),
)
GREEDY = tuple(
    Measure(f"after.greedy.{key}", title, PERCENT)
    for key, title in (
        ("exact", "whole target"),
        ("bleu", "BLEU"),
        ("rouge_l", "ROUGE-L"),
        ("edit_similarity", "edit similarity"),
    )
)
REPAIRED = Measure("repaired", "repaired", PERCENT)
SECONDS = Measure("cost.seconds", "seconds", 1, 2, " s", -1)
EQUIVALENTS = Measure("cost.forward_equivalents", "forward equivalents", 1, 1, "", -1)
COST = (
    SECONDS,
    EQUIVALENTS,
    Measure("cost.steps", "steps", 1, 1, "", -1),
    Measure("cost.peak_memory", "peak memory above the model", 1e-6, 1, " MB", -1),
    Measure("patch.neurons", "neurons changed", 1, 0, "", -1),
    Measure("patch.parameters", "parameters changed", 1, 0, "", -1),
    Measure("patch.bytes", "patch", 1e-6, 2, " MB", -1),
)
HELDOUT = tuple(
    Measure(f"heldout.change.{key}", title, PERCENT)
    for key, title in (("token_match", "ExactMatch, tokens"), ("exact_match", "whole target"), ("bleu", "BLEU"))
)


def place(group: tuple[str, str]) -> str:
    return f"{group[1]}, {group[0]}"


def _table(
    results: Sequence[Result],
    study: str,
    measures: Sequence[Measure],
    against: Measure | None = None,
    untouched: bool = False,
    note: str = "",
) -> Table | None:
    """Means with intervals, a row a method; the paired difference against STAR in one measure at the end."""
    blocks = []
    for key, members in by_group(results, study):
        found = groups(members)
        star = reference(found)
        rows = []
        if untouched and found:
            rows.append(("untouched model", _untouched(found[0], measures, against)))
        for group in found:
            figures = [Shown(str(len(group.rows)))]
            figures += [shown(group.mean(measure.key), measure) for measure in measures]
            if against is not None:
                other = None if star is None or group is star else difference(group, star, against.key)
                figures.append(compared(other, against))
            rows.append((group.name, tuple(figures)))
        blocks.append((place(key), tuple(rows)))
    if not blocks:
        return None
    titles = ["failures", *(measure.title for measure in measures)]
    if against is not None:
        titles.append(f"{against.title}, against STAR")
    return Table(tuple(titles), tuple(blocks), note)


def _untouched(group: Group, measures: Sequence[Measure], against: Measure | None) -> tuple[Shown, ...]:
    """The same figures before any repair; they are the same for every method."""
    figures = [Shown(str(len(group.rows)))]
    for measure in measures:
        key = measure.key.replace("after.", "before.")
        figures.append(NOTHING if key == measure.key else shown(group.mean(key), measure))
    return tuple(figures + [NOTHING] * (against is not None))


def effectiveness(results: Sequence[Result]) -> Table | None:
    return _table(results, "alone", (REPAIRED, *TEACHER), MATCH, untouched=True)


def effectiveness_greedy(results: Sequence[Result]) -> Table | None:
    return _table(results, "alone", GREEDY, GREEDY[0], untouched=True)


def efficiency(results: Sequence[Result]) -> Table | None:
    """Cost, with the time as a multiple of STAR's."""
    table = _table(results, "alone", COST)
    if table is None:
        return None
    blocks = []
    for (heading, rows), (_, members) in zip(table.blocks, by_group(results, "alone"), strict=True):
        found = {group.name: group for group in groups(members)}
        star = reference(list(found.values()))
        made = []
        for name, figures in rows:
            ratio = None if star is None or name == star.name else times(found[name], star, EQUIVALENTS.key)
            made.append((name, (*figures, _multiple(ratio))))
        blocks.append((heading, tuple(made)))
    return Table((*table.columns, "time, × STAR’s"), tuple(blocks))


def _multiple(found: Interval | None) -> Shown:
    if found is None:
        return NOTHING
    stands = "worse" if found.low > 1 else "better" if found.high < 1 else ""
    return Shown(f"{found.mean:.2f} ×", f"{found.low:.2f} to {found.high:.2f}", stands)


def drift_kinds(results: Sequence[Result]) -> list[str]:
    """The kinds of reference text that were measured, the largest mean KL first."""
    return worst_first(row.values for result in results for row in result.rows)


def drift(results: Sequence[Result], study: str = "alone") -> Table | None:
    measures = []
    for kind in drift_kinds(results):
        measures.append(Measure(f"drift.{kind}.kl", f"KL, {kind}", 1, 4, "", -1))
        measures.append(Measure(f"drift.{kind}.agreement", f"agreement, {kind}", PERCENT, 2))
        measures.append(Measure(f"drift.{kind}.perplexity_after", f"perplexity, {kind}", 1, 1, "", -1))
    return _table(results, study, measures, measures[0]) if measures else None


def generalisation(results: Sequence[Result]) -> Table | None:
    """Other prompts that want the same target: ExactMatch after minus before, by kind."""
    keys = {
        key.split(".")[1]
        for result in results
        for row in result.rows
        for key in row.values
        if key.startswith("generalisation.")
    }
    measures = [
        Measure(f"generalisation.{kind}.change.{key}", f"{kind}: {title}", scale, 1 if scale == PERCENT else 2)
        for kind in ("paraphrases", "context", "case")
        if kind in keys
        for key, title, scale in (("match", "ExactMatch", PERCENT), ("gap", "gap", 1.0))
    ]
    against = next((measure for measure in measures if ".context." in measure.key), None)
    return _table(results, "alone", measures, against) if measures else None


def specificity(results: Sequence[Result]) -> Table | None:
    """Look-alike neighbours, whose answers must not change."""
    measures = (
        Measure("specificity.unchanged", "same token preferred", PERCENT),
        Measure("specificity.unchanged_texts", "same greedy text", PERCENT),
        Measure("specificity.change.match", "ExactMatch, change", PERCENT),
        Measure("specificity.change.gap", "gap, change", 1, 3),
    )
    rows = (row for result in results for row in result.rows)
    if not any("specificity.unchanged" in row.values for row in rows):
        return None
    return _table(results, "alone", measures, measures[0])


def knowledge(results: Sequence[Result]) -> Table | None:
    """The grid of knowledge and wordings: a cell is repaired, the rest of its row and column are read."""
    measures = (
        REPAIRED,
        Measure("grid.row.change.match", "row: ExactMatch, change", PERCENT),
        Measure("grid.row.change.gap", "row: gap, change", 1, 3),
        Measure("grid.row.change.reciprocal_rank", "row: 1/rank, change", 1, 3),
        Measure("grid.column.change.match", "column: ExactMatch, change", PERCENT),
        Measure("grid.column.change.gap", "column: gap, change", 1, 3),
        Measure("grid.column.change.reciprocal_rank", "column: 1/rank, change", 1, 3),
        Measure("grid.column.unchanged", "column: same token", PERCENT),
        Measure("grid.elsewhere.unchanged", "elsewhere: same token", PERCENT),
    )
    return _table(results, "grid", measures, measures[1])


def cumulative(results: Sequence[Result]) -> Table | None:
    """The end of every curve, and one joint solve of the same failures beside it."""
    kinds = worst_first(point for result in results for point in result.curve)
    measures = [
        Measure("k", "repairs", 1, 0),
        Measure("repaired", "repaired at their turn", 1, 0),
        Measure("holding", "of these still hold", PERCENT),
        Measure("right", "of all right now", PERCENT),
        Measure("heldout.token_match", "held-out ExactMatch", PERCENT),
        Measure("heldout.teacher_bleu", "held-out BLEU", PERCENT),
        *(Measure(f"drift.{kind}.kl", f"KL, {kind}", 1, 3) for kind in kinds),
    ]
    blocks = []
    for key, members in by_group(results, "cumulative"):
        rows: list[tuple[str, tuple[Shown, ...]]] = []
        for group in groups(members):
            first = group.first
            if first.curve and not rows:
                rows.append(("untouched model", tuple(_at(first.curve[0], m) for m in measures)))
            if first.curve:
                rows.append((f"{group.name}, one after another", tuple(_at(first.curve[-1], m) for m in measures)))
            joint = {name.removeprefix("joint."): value for name, value in first.whole.items() if "joint." in name}
            if joint:
                rows.append((f"{group.name}, in one solve", tuple(_at(joint, m) for m in measures)))
        blocks.append((place(key), tuple(rows)))
    return Table(tuple(measure.title for measure in measures), tuple(blocks)) if blocks else None


def _at(values: Mapping[str, float], measure: Measure) -> Shown:
    return Shown(number(values[measure.key], measure)) if measure.key in values else NOTHING


def sparsity(results: Sequence[Result]) -> Table | None:
    measures = [REPAIRED, MATCH, SECONDS]
    kinds = drift_kinds([result for result in results if result.study == "sparsity"])
    measures += [Measure(f"drift.{kind}.kl", f"KL, {kind}", 1, 4, "", -1) for kind in kinds[:1]]
    measures += [
        Measure("generalisation.paraphrases.change.match", "paraphrases, change", PERCENT),
        Measure("specificity.unchanged", "neighbours: same token", PERCENT),
        HELDOUT[0],
        Measure("patch.neurons", "neurons", 1, 0, "", -1),
    ]
    return _table(results, "sparsity", measures)


def overfitting(results: Sequence[Result]) -> Table | None:
    measured = [r for r in results if r.study == "alone" and any("heldout.change.bleu" in row.values for row in r.rows)]
    return _table(measured, "alone", HELDOUT, HELDOUT[0])


def together(results: Sequence[Result]) -> Table | None:
    """One patch for all failures: shares over failures, and the figures of that one patch."""
    blocks = []
    kinds = worst_first(result.whole for result in results)
    single = [
        *(Measure(f"drift.{kind}.kl", f"KL, {kind}", 1, 4) for kind in kinds),
        *(Measure(f"drift.{kind}.agreement", f"agreement, {kind}", PERCENT) for kind in kinds),
        Measure("heldout.change.token_match", "held-out ExactMatch, change", PERCENT),
        Measure("specificity.unchanged", "neighbours: same token", PERCENT),
        Measure("cost.seconds", "seconds", 1, 1, " s"),
        Measure("patch.neurons", "neurons", 1, 0),
    ]
    for key, members in by_group(results, "together"):
        rows = []
        for group in groups(members):
            whole = group.first.whole
            figures = [Shown(str(len(group.first.rows)))]
            figures += [shown(group.mean(measure.key), measure) for measure in (REPAIRED, MATCH)]
            figures += [_at(whole, measure) for measure in single]
            rows.append((group.name, tuple(figures)))
        blocks.append((place(key), tuple(rows)))
    titles = ("failures", REPAIRED.title, MATCH.title, *(measure.title for measure in single))
    return Table(titles, tuple(blocks)) if blocks else None


def stated(results: Sequence[Result]) -> Table | None:
    """What arXiv 2503.12899 states of STAR against MINT and SGD, beside what was measured here."""
    blocks = []
    for key, members in by_group(results, "alone"):
        found = groups(members)
        stars = [group for group in found if group.first.base == "star"]
        others = [group for group in found if group.first.base in ("mint", "sgd")]
        rows = []
        for star in stars:
            for other in others:
                gain, points = ratio_of_means(star, other, MATCH.key), difference(star, other, MATCH.key)
                faster = times(other, star, EQUIVALENTS.key)
                gained = Measure("", "", PERCENT, 1, " %")
                rows.append(
                    (
                        f"{star.name} against {other.name}",
                        (
                            compared(points, MATCH),
                            compared(gain, gained),
                            Shown(_verdict(gain, *STATED["match"], 0.0)),
                            _multiple_inverse(faster),
                            Shown(_verdict(faster, *STATED["time"], 1.0)),
                        ),
                    )
                )
        if rows:
            blocks.append((place(key), tuple(rows)))
    columns = (
        "ExactMatch, points",
        "ExactMatch, relative",
        "stated: 10.5 to 19.9 % better",
        "time of the other, × STAR’s",
        "stated: 2.4 to 7.0 times faster",
    )
    return Table(columns, tuple(blocks)) if blocks else None


def _multiple_inverse(found: Interval | None) -> Shown:
    if found is None:
        return NOTHING
    stands = "better" if found.low > 1 else "worse" if found.high < 1 else ""
    return Shown(f"{found.mean:.2f} ×", f"{found.low:.2f} to {found.high:.2f}", stands)


def _verdict(found: Interval | None, low: float, high: float, even: float) -> str:
    """Whether an interval agrees with a stated range, is on its side of even, or is not."""
    if found is None:
        return "not measured"
    if found.high < even:
        return "no: the other way round"
    if found.low <= even:
        return "no: no clear difference"
    if found.high < low:
        return "in part: better, by less than stated"
    return "yes: more than stated" if found.low > high else "yes: within what was stated"
