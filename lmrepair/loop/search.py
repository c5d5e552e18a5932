"""The way through the gate: shrink a patch, hold on to what it broke, leave out the failures that cost most."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmrepair.failures import Tokens
from lmrepair.loop.judge import Changes, Guard, Judgement, sites_of


@dataclass(frozen=True)
class Gated:
    """What the gate did to a patch.

    ``scale``: of the solved deltas, in the patch that was kept; 0: none was. ``kl``: of that patch (or, where
    none was kept, of what was refused last), by the reference's name, the largest first; empty where not
    measured. ``protected`` and ``memory``: how many prompts and earlier repairs were watched;
    ``unwatched`` of each: not as described before the repair. ``refused``: what spoke against the patch as
    first solved. ``dropped``: ids of failures that were repaired by that and are left unrepaired.
    """

    max_kl: float
    scale: float
    kl: Mapping[str, float]
    protected: int
    protected_unwatched: int
    memory: int
    memory_unwatched: int
    solves: int
    weighed: int
    refused: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def data(self) -> dict[str, Any]:
        """As plain values, for a patch's record; no limit on KL is null."""
        found = {**vars(self), "kl": dict(self.kl), "refused": list(self.refused), "dropped": list(self.dropped)}
        return {**found, "max_kl": self.max_kl if self.max_kl < float("inf") else None}


@dataclass(frozen=True)
class Solved:
    """What one solve made: its changes, and which failures (by index) it repairs or were right before it."""

    changes: Changes
    repaired: tuple[int, ...]
    right: tuple[int, ...]


Solve = Callable[[Sequence[int], Sequence[Tokens]], Solved]


@dataclass(frozen=True)
class Run:
    """One solve, and what the gate says to it; ``judged`` is None where nothing was repaired."""

    solved: Solved
    judged: Judgement | None = None

    @property
    def passes(self) -> bool:
        return self.judged is not None and self.judged.passes

    @property
    def broken(self) -> tuple[Tokens, ...]:
        return (*self.judged.full.broken, *self.judged.verdict.broken) if self.judged is not None else ()


@dataclass(frozen=True)
class Search:
    """Looks for a patch that passes. ``solve`` takes indices of failures, and rows to keep as they are."""

    guard: Guard
    tokens: Sequence[Tokens]
    solve: Solve
    report: Callable[[int], None] = lambda _: None

    def run(self) -> list[Run]:
        """All runs made, at most ``Gate.solves``; the first is for all failures.

        A patch that is refused for what it broke is solved once more with that among the rows to keep, and then
        with all earlier repairs among them. If no scale of it will do, the failures that cost most are left
        out: how many, by bisection on their number.
        """
        whole = range(len(self.tokens))
        kept: tuple[Tokens, ...] = ()
        runs = [self._one(whole, kept)]
        for everything in ((), self.guard.memory):
            more = tuple(item for item in dict.fromkeys((*runs[-1].broken, *everything)) if item not in kept)
            if runs[-1].passes or not runs[-1].broken or not more or len(runs) == self.guard.gate.solves:
                break
            kept += more
            runs.append(self._one(whole, kept))
        return runs + self._fewer(runs[-1], kept, self.guard.gate.solves - len(runs))

    def _fewer(self, last: Run, kept: Sequence[Tokens], solves: int) -> list[Run]:
        if last.judged is None or last.passes:
            return []
        repaired, sites = last.solved.repaired, sites_of(last.solved.changes)
        order = self.guard.cheapest_first([self.tokens[index] for index in repaired], last.judged, sites)
        runs: list[Run] = []
        low, high = 0, len(order)
        while high - low > 1 and len(runs) < solves:
            count = (low + high) // 2
            chosen = sorted([*last.solved.right, *(repaired[at] for at in order[:count])])
            runs.append(self._one(chosen, kept))
            low, high = (count, high) if runs[-1].passes else (low, count)
        return runs

    def _one(self, chosen: Sequence[int], kept: Sequence[Tokens]) -> Run:
        solved = self.solve(chosen, kept)
        if not solved.repaired or not solved.changes:
            return Run(solved)
        return Run(solved, self.guard.judge(solved.changes, [self.tokens[i] for i in solved.repaired], self.report))


def best_of(runs: Sequence[Run]) -> Run | None:
    """The run that passes with most failures repaired, the last of equals; None: none passes."""
    passing = [run for run in reversed(runs) if run.passes]
    return max(passing, key=lambda run: len(run.solved.repaired), default=None)


def gated(guard: Guard, runs: Sequence[Run], best: Run | None) -> Gated:
    """What was done, as a record; which failures were dropped is for the loop to say."""
    judged = [run.judged for run in runs if run.judged is not None]
    shown = best.judged if best is not None else judged[-1] if judged else None
    refused = judged[0].full.reasons if judged else ()
    return Gated(
        max_kl=guard.gate.max_kl,
        scale=best.judged.verdict.scale if best is not None and best.judged is not None else 0.0,
        kl=shown.verdict.kl if shown is not None else {},
        protected=len(guard.protected),
        protected_unwatched=guard.given[0] - len(guard.protected),
        memory=len(guard.memory),
        memory_unwatched=guard.given[1] - len(guard.memory),
        solves=len(runs),
        weighed=sum(item.weighed for item in judged),
        refused=refused,
    )


def why(runs: Sequence[Run], best: Run | None) -> str:
    """Why a failure that was repaired by the first solve is left unrepaired."""
    judged = [run.judged for run in runs if run.judged is not None and not run.passes]
    if not judged:
        return "repaired at first, but greedy decoding gives another text at the scale that passes the gate"
    spoke = judged[0] if best is not None else judged[-1]
    said = "; ".join(spoke.verdict.reasons)
    if best is None:
        return f"no patch that repairs it passes the gate: {said}; allow more, or try another method or setting"
    return f"left out, so that the others pass the gate: with it, {said}; allow more, or repair it in another patch"
