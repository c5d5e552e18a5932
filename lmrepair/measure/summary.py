"""All the figures of one net, and of one patch on it: what ``lmrepair evaluate`` shows. Maths: docs/measures.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from lmrepair.errors import UsageError
from lmrepair.failures import Failure, Reference, Tokens
from lmrepair.measure.answer import Answer, Scores, answers, scores
from lmrepair.measure.drift import Drift, measure_drift_by_kind
from lmrepair.measure.effects import Effect, HeldOut, SideEffects, Standing, effect, held_out_scores, side_effects
from lmrepair.measure.grid import Grid, GridEffects, grid_effects
from lmrepair.measure.intervals import Interval, bootstrap, paired
from lmrepair.model import Net, Progress, quiet
from lmrepair.patch import Patch


@dataclass(frozen=True)
class Material:
    """What is read: failures to score, rows that nothing was repaired on, reference text by kind, a grid."""

    failures: Sequence[Failure]
    held_out: Sequence[Failure] = ()
    references: Sequence[Reference] = ()
    grid: Grid | None = None


@dataclass(frozen=True)
class Matches:
    """Token match failure by failure, its mean with a bootstrap interval; None without a patch."""

    before: Interval
    after: Interval | None
    difference: Interval | None


@dataclass(frozen=True)
class GridMeasures:
    """The grid: how its cells stand by wording, and with a patch the effect on all cells, and the effects
    seen from each cell that the patch was made for.
    """

    failing: int
    wordings: Mapping[str, Standing]
    whole: Effect | None
    cells: tuple[GridEffects, ...]


@dataclass(frozen=True)
class Measures:
    """The figures; what needs a patch, or material that was not given, is None (or empty).

    ``patched`` counts the failures that the patch was made for: their side effects are measured. Drift
    is worst kind first; without a patch it tells the perplexity alone.
    """

    before: Scores
    after: Scores | None
    matches: Matches
    patched: int
    side_effects: SideEffects | None
    held_out: HeldOut | None
    drift: Mapping[str, Drift]
    grid: GridMeasures | None


def measure(
    net: Net,
    material: Material,
    patch: Patch | None = None,
    texts: bool = True,
    progress: Progress = quiet,
) -> Measures:
    """Measure a net, and a patch on it; the net is left as it was given.

    Raises UsageError for held-out rows that the patch was made for, and where ``texts`` need the extra
    ``bench``; WrongModelError for a net that the patch does not fit.
    """
    tokens = net.tokenize(material.failures)
    made_for = {} if patch is None else {(item.tokens.prompt, item.tokens.target): item for item in patch.items}
    _refuse_seen(net, material.held_out, patch)
    mine = [(item.prompt, item.target) in made_for for item in tokens]
    progress("failures", 0, len(tokens))
    old = answers(net, tokens)
    new = None
    if patch is not None:
        with patch.on(net):
            drafts = [
                was.target if own else item.written or () for item, was, own in zip(old, tokens, mine, strict=True)
            ]
            new = answers(net, tokens, drafts=drafts)
    repaired = [row for row, is_mine in zip(material.failures, mine, strict=True) if is_mine]
    others = [row for row, is_mine in zip(material.failures, mine, strict=True) if not is_mine]
    around = None
    if patch is not None and repaired:
        progress("side effects", 0, 1)
        around = side_effects(net, patch, repaired, [*material.held_out, *others])
    held_out = None
    if material.held_out:
        progress("held out", 0, 1)
        held_out = held_out_scores(net, [patch] if patch else [], material.held_out, texts, generate=True)
    edit = patch or _Untouched()
    drift = measure_drift_by_kind(
        net, [edit], material.references, lambda done, total: progress("drift", done, total)
    ) or [{}]
    return Measures(
        before=scores(net, old, texts),
        after=None if new is None else scores(net, new, texts),
        matches=_matches(old, new),
        patched=len(repaired),
        side_effects=around,
        held_out=held_out,
        drift=drift[0],
        grid=None if material.grid is None else _grid(net, material.grid, patch, set(made_for)),
    )


class _Untouched:
    """No edit at all: drift then tells the perplexity."""

    def on(self, net: Net) -> AbstractContextManager[None]:  # noqa: ARG002
        return nullcontext()


def _refuse_seen(net: Net, held_out: Sequence[Failure], patch: Patch | None) -> None:
    if patch is None:
        return
    prompts = {item.tokens.prompt for item in patch.items}
    seen = [row.id for row, item in zip(held_out, net.tokenize(held_out), strict=True) if item.prompt in prompts]
    if seen:
        raise UsageError(
            f"{len(seen)} held-out rows (the first is {seen[0]!r}) have prompts that the patch was made for; "
            "take them out of the held-out file"
        )


def _matches(old: Sequence[Answer], new: Sequence[Answer] | None) -> Matches:
    before = [item.match for item in old]
    if new is None:
        return Matches(bootstrap(before), None, None)
    after = [item.match for item in new]
    return Matches(bootstrap(before), bootstrap(after), paired(after, before))


def _grid(
    net: Net, grid: Grid, patch: Patch | None, made_for: set[tuple[tuple[int, ...], tuple[int, ...]]]
) -> GridMeasures:
    found = answers(net, grid.cells, generate=False)
    width = len(grid.wordings)
    wordings = {name: Standing.of(found[s::width]) for s, name in enumerate(grid.wordings)}
    failing = sum(item.match < 1 for item in found)
    if patch is None:
        return GridMeasures(failing, wordings, None, ())
    with patch.on(net):
        after = answers(net, _ids(found), generate=False)
    places = [at for at, item in enumerate(_ids(found)) if (item.prompt, item.target) in made_for]
    cells = tuple(grid_effects(net, grid, patch, divmod(at, width), found) for at in places)
    return GridMeasures(failing, wordings, effect(found, after), cells)


def _ids(found: Sequence[Answer]) -> list[Tokens]:
    return [item.tokens for item in found]
