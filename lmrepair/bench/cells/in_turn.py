"""Repairs one after another on the same model without going back, and in one joint solve beside it.

What becomes of earlier repairs, of held-out rows and of reference text (arXiv 2503.12899 calls this the
cumulative impact). The net is as it was, bit for bit, when this ends, however it ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmrepair.errors import FailuresError, UsageError
from lmrepair.failures import Failure, Reference, Tokens, contradictions
from lmrepair.loop import Outcome, repair, repair_each
from lmrepair.measure import Drift, Scores, answers, measure_drift_by_kind, scores
from lmrepair.methods import Method
from lmrepair.model import Net, Progress, Projections, Statistics, Trial, patched, put, quiet, statistics_of, take

MOST = 100  # repairs in one run


@dataclass(frozen=True)
class Point:
    """The net after ``repairs`` failures were worked on.

    ``repaired``: how many of those that failed at their turn were repaired then. ``holding``: share of
    those that hold now, under teacher forcing and in free greedy text (1 where there are none).
    ``right``: share of all failures worked on that hold now, whoever repaired them. ``held_out``: scores
    on rows nobody repaired (None: no rows given). ``drift``: against the untouched net, worst kind first.
    """

    repairs: int
    repaired: int
    holding: float
    right: float
    held_out: Scores | None
    drift: Mapping[str, Drift]


@dataclass(frozen=True)
class Cumulative:
    """The curve: ``start`` is the untouched net, ``points`` the net every so many repairs, the last one
    included; ``joint`` the untouched net after one solve of all failures together (None: not asked for).
    """

    start: Point
    points: tuple[Point, ...]
    outcomes: tuple[Outcome, ...]
    joint: Point | None


def cumulative(
    net: Net,
    failures: Sequence[Failure],
    method: Method,
    held_out: Sequence[Failure] = (),
    references: Sequence[Reference] = (),
    every: int = 10,
    joint: bool = True,
    texts: bool = False,
    progress: Progress = quiet,
    statistics: Statistics | None = None,
) -> Cumulative:
    """Repair the failures one after another, each on the net that the repairs before it left.

    A failure that is right at its turn is passed over, a repair that does not succeed is undone, as the
    loop does it. ``texts``: held-out scores with BLEU, ROUGE-L and edit similarity (the extra ``bench``).
    Takes three more copies of the FFN output projections at most. Raises UsageError for more than 100
    failures or a step below 1, FailuresError for failures that contradict each other.
    """
    if not 1 <= len(failures) <= MOST or every < 1:
        raise UsageError(f"{len(failures)} failures, a point every {every}; expected 1 to {MOST}, every 1 or more")
    for first, second in contradictions(failures):
        raise FailuresError(
            f"failures {first.id!r} and {second.id!r} want different targets for one prompt; "
            "no model can give both: keep one"
        )
    asked = method.asks()
    if statistics is None and asked:
        statistics = statistics_of(net, asked, asked.alike(failures))
    run = _Run(net, net.tokenize(failures), net.tokenize(held_out), tuple(references), texts)
    with Trial(net, net.every_site()) as trial:
        run.untouched = Projections(trial.originals)
        start = run.point([], 0)
        points, outcomes = [], []
        for number, failure in enumerate(failures, start=1):
            progress("repairs", number - 1, len(failures))
            outcomes.append(_repair(net, failure, method, statistics))
            if number % every == 0 or number == len(failures):
                points.append(run.point(outcomes, number))
        together = None
        if joint:
            progress("joint solve", 0, 1)
            run.untouched.write(net)
            together = run.together(failures, method, statistics)
    return Cumulative(start, tuple(points), tuple(outcomes), together)


def _repair(net: Net, failure: Failure, method: Method, statistics: Statistics | None) -> Outcome:
    """One repair, kept if it repairs; statistics are those of the untouched net."""
    (result,) = repair_each(net, [failure], method, statistics=statistics)
    if result.patch is not None and result.repaired:
        for layer, change in result.patch.changes.items():
            put(net, layer, change.columns, patched(take(net, layer, change.columns), change.delta))
    return result.outcomes[0]


@dataclass
class _Run:
    """What every point is measured on."""

    net: Net
    tokens: Sequence[Tokens]
    held_out: Sequence[Tokens]
    references: Sequence[Reference]
    texts: bool
    untouched: Projections | None = None

    def point(self, outcomes: Sequence[Outcome], done: int) -> Point:
        """Measure the net as it is now; the drift is that of this state written over the untouched one."""
        found = answers(self.net, self.tokens[:done], drafts=[item.target for item in self.tokens[:done]])
        right = [item.holds for item in found]
        mine = [hold for hold, outcome in zip(right, outcomes, strict=True) if outcome.failing and outcome.repaired]
        return Point(
            repairs=done,
            repaired=len(mine),
            holding=sum(mine) / len(mine) if mine else 1.0,
            right=sum(right) / done if done else 1.0,
            held_out=self._held_out(),
            drift=self._drift(),
        )

    def together(self, failures: Sequence[Failure], method: Method, statistics: Statistics | None) -> Point:
        """One joint solve from the untouched net, which ``repair`` leaves patched."""
        smallest = min(self.references, key=lambda one: sum(map(len, one.texts)), default=None)
        result = repair(self.net, failures, method, smallest, statistics=statistics)
        return self.point(result.outcomes, len(failures))

    def _held_out(self) -> Scores | None:
        if not self.held_out:
            return None
        return scores(self.net, answers(self.net, self.held_out), self.texts)

    def _drift(self) -> Mapping[str, Drift]:
        if not self.references or self.untouched is None:
            return {}
        now = Projections.of(self.net)
        with self.untouched.on(self.net):
            (found,) = measure_drift_by_kind(self.net, [now], self.references)
        return found
