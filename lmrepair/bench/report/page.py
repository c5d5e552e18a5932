"""One self-contained HTML page from a folder of cells: opens offline, runs no script, asks nobody for anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmrepair.bench.report.figures import groups, worst_first
from lmrepair.bench.report.fix_page import fix_page
from lmrepair.bench.report.fixes import is_fix, read_fixes
from lmrepair.bench.report.plots import Plot, costs, curves, heat_maps, pareto
from lmrepair.bench.report.results import Result, by_group, read_results
from lmrepair.bench.report.sheet import filled
from lmrepair.bench.report.tables import (
    Table,
    cumulative,
    drift,
    effectiveness,
    effectiveness_greedy,
    efficiency,
    generalisation,
    knowledge,
    overfitting,
    place,
    sparsity,
    specificity,
    stated,
    together,
)
from lmrepair.errors import UsageError
from lmrepair.failures import write_atomically
from lmrepair.measure import visible

TOKEN_VIEWS = 20  # failures shown token by token, for each model and task


@dataclass(frozen=True)
class Section:
    """A part of the page: what it is about, its tables (with captions) and its plots."""

    id: str
    title: str
    text: str
    tables: tuple[tuple[str, Table], ...] = ()
    plots: tuple[Plot, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A token as it is shown; ``wanted``: what should stand there if it is a mistake."""

    text: str
    wanted: str | None = None


@dataclass(frozen=True)
class View:
    """One failure: prompt, wanted tokens, and what each method's model prefers, before and after."""

    id: str
    prompt: str
    target: str
    lines: tuple[tuple[str, str, tuple[Piece, ...]], ...]


def write_report(source: str | Path, output: str | Path, views: int = TOKEN_VIEWS) -> int:
    """Write the report of a folder of results, of a bench or of ``fix``, or of one result of ``fix``; how many.

    Raises ResultsError for a source without sound results, UsageError where the extra ``bench`` is missing
    or the page has no place to go.
    """
    source, output = Path(source), Path(output)
    if output.is_dir():
        raise UsageError(f"{output} is a folder; expected the HTML file to write")
    if output.is_file() and not _is_page(output):
        raise UsageError(f"{output} is there and is no HTML page; expected a free name, or an old report")
    files = [source] if source.is_file() else sorted(source.glob("*.json"))
    if files and (source.is_file() or is_fix(files[0])):
        fixes = read_fixes(files)
        count, text = len(fixes), fix_page(fixes)
    else:
        results = read_results(source)
        count, text = len(results), page(results, views)
    write_atomically(output, text.encode("utf-8", "backslashreplace"))
    return count


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    return not start or start.startswith(b"<!doctype html")


def page(results: Sequence[Result], views: int = TOKEN_VIEWS) -> str:
    """The report as HTML. Everything that came from a prompt, a model or a grid is escaped."""
    done = [result for result in results if not result.error]
    return filled(
        "page.html",
        ("page.css",),
        grids=sorted({result.grid for result in results}),
        facts=_facts(done),
        sections=[section for section in _sections(done) if section.tables or section.plots],
        token_views=_views(done, views),
        failed=[result for result in results if result.error],
        settings=_settings(done),
        shown=views,
    )


def _facts(results: Sequence[Result]) -> list[tuple[str, str]]:
    machines = {
        f"{m.get('processor')}, threads: {m.get('threads')}, {m.get('device')}" for m in (r.machine for r in results)
    }
    versions = {", ".join(f"{name} {number}" for name, number in result.versions.items()) for result in results}
    return [
        ("cells", f"{len(results)} measured in {sum(result.seconds for result in results) / 60:.1f} minutes of work"),
        ("models", ", ".join(sorted({result.model for result in results}))),
        ("data", ", ".join(dict.fromkeys(result.data for result in results))),
        ("methods", ", ".join(dict.fromkeys(result.method for result in results))),
        ("seeds", ", ".join(map(str, sorted({result.seed for result in results})))),
        ("measured on", "; ".join(sorted(machines))),
        ("versions", "; ".join(sorted(versions))),
    ]


def _sections(results: Sequence[Result]) -> list[Section]:
    def made(*found: tuple[str, Table | None]) -> tuple[tuple[str, Table], ...]:
        return tuple((caption, table) for caption, table in found if table is not None)

    def drawn(*found: Plot | None) -> tuple[Plot, ...]:
        return tuple(plot for plot in found if plot is not None)

    return [
        Section(
            "stated",
            "What is stated, and what was found here",
            "arXiv 2503.12899 states that STAR improves ExactMatch on CoNaLa by 10.5 to 19.9 % over prior work and "
            "runs 2.4 to 7.0 times faster. A row compares one STAR with one MINT or SGD on the same failures, "
            "their times in forward equivalents.",
            made(("STAR against MINT and SGD", stated(results))),
        ),
        Section(
            "effectiveness",
            "Effectiveness",
            "Every failure is repaired alone, from the untouched model. ExactMatch is the share of target tokens that "
            "the model prefers, fed prompt and target so far; the other figures compare the preferred tokens, as "
            "text, with the target. In free greedy decoding the model reads its own output instead.",
            made(
                ("Under teacher forcing, in %", effectiveness(results)),
                ("In free greedy decoding, in %", effectiveness_greedy(results)),
            ),
        ),
        Section(
            "efficiency",
            "Efficiency",
            "From the first diagnosis of a failure to the last teacher-forced check. A forward equivalent is the time "
            "of one plain forward pass over the same tokens in the same run.",
            made(("Cost of one repair", efficiency(results))),
            drawn(costs(results)),
        ),
        Section(
            "side-effects",
            "Side effects",
            "Generalisation: other prompts that ask for the same target should improve. Specificity: look-alike rows "
            "that want something else should stay as they are. In the grid rows share the knowledge asked for (they "
            "should improve) and columns the wording (they should stay). Drift: what changes on reference text.",
            made(
                ("Generalisation: change, in points of % and of probability", generalisation(results)),
                ("Grid: repair one cell, read the rest of its row and column", knowledge(results)),
                ("Specificity: look-alike neighbours, in %", specificity(results)),
                ("Drift: KL in nats per token, top tokens unchanged in %, perplexity", drift(results)),
            ),
            drawn(*(pareto(results, *spec) for spec in PARETO)),
        ),
        Section(
            "sparsity",
            "Sparsity",
            "The same repairs, allowed to write to a share of the layers and of their neurons.",
            made(("Shares of layers and neurons", sparsity(results))),
            tuple(heat_maps(results)),
        ),
        Section(
            "overfitting",
            "Overfitting risk",
            "Rows of the same task that no repair saw, after each repair: the change against the untouched model.",
            made(("Held-out rows: change, in points of %", overfitting(results))),
        ),
        Section(
            "cumulative",
            "Cumulative impact",
            "Repairs one after another on the same model, without going back; and all of them in one patch.",
            made(
                ("After the last repair", cumulative(results)),
                ("One patch for all failures", together(results)),
            ),
            drawn(*(curves(results, *spec) for spec in (*CURVES, *_drift_curves(results)))),
        ),
    ]


def _drift_curves(results: Sequence[Result]) -> list[tuple[Any, ...]]:
    kinds = worst_first(point for result in results for point in result.curve)
    return [(f"drift.{kind}.kl", f"KL on {kind} text, nats/token", f"drift-{at}") for at, kind in enumerate(kinds)]


PARETO: tuple[tuple[Any, ...], ...] = (
    ("after.teacher.token_match", "ExactMatch after, %", "target tokens preferred afterwards", "pareto"),
    ("generalisation.context.after.match", "behind another example, %",
     "target tokens preferred where another example stands before the prompt", "pareto-context"),
)  # fmt: skip
CURVES: tuple[tuple[Any, ...], ...] = (
    ("holding", "repairs that still hold, %", "holding", 100.0),
    ("heldout.token_match", "held-out ExactMatch, %", "heldout", 100.0),
)


def _views(results: Sequence[Result], most: int) -> list[tuple[str, list[View], int]]:
    """Token by token, the first failures of every model and task."""
    found = []
    for key, members in by_group(results, "alone"):
        named = groups(members)
        rows = named[0].first.rows
        made = []
        for row in rows[:most]:
            lines = [("before", "", _pieces(row.tokens, row.before))]
            for group in named:
                after = next((other for other in group.first.rows if other.id == row.id), None)
                if after is not None:
                    state = "repaired" if after.values.get("repaired") else "not repaired"
                    lines.append((group.name, state, _pieces(after.tokens, after.after)))
            made.append(View(row.id, visible(row.prompt, None), visible(row.target, None), tuple(lines)))
        found.append((place(key), made, len(rows)))
    return found


def _pieces(tokens: Sequence[str], said: Any) -> tuple[Piece, ...]:
    return tuple(
        Piece(_token(said[at]), _token(token)) if at in said else Piece(_token(token))
        for at, token in enumerate(tokens)
    )


def _token(text: str) -> str:
    """A token with its spaces and line ends to be seen."""
    return visible(text.replace("\n", "⏎"), None).replace(" ", "·") or "∅"


def _settings(results: Sequence[Result]) -> list[tuple[str, str, str]]:
    """Method, preset and settings, each once."""
    found = dict.fromkeys(
        (
            result.method,
            result.base + (f", preset {result.preset}" if result.preset else ""),
            ", ".join(f"{key} {value}" for key, value in result.settings.items()),
        )
        for result in results
        if result.study != "sparsity"
    )
    return list(found)
