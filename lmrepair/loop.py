"""The loop: diagnose → locate → solve → apply → check → keep or undo. The file to read first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lmrepair.basis import Bases
from lmrepair.diagnosis import Diagnosis, Mistake, diagnoses
from lmrepair.drift import Drift, Reference, measure_drift, read_reference
from lmrepair.errors import FailuresError
from lmrepair.failures import Failure, Tokens, contradictions
from lmrepair.fingerprint import fingerprint
from lmrepair.methods import Method, Problem, Star
from lmrepair.moments import Metric, Statistics
from lmrepair.net import Batch, Net, Preference, Sites, settled
from lmrepair.patch import Patch
from lmrepair.patchfile import Item, Made
from lmrepair.statistics import statistics_of
from lmrepair.trial import Change, Trial

MARGIN_ROUNDS = 3  # at most, where the check finds another token than the loop did
SPARE_MARGIN = 0.1  # logits asked for in addition in each of them
FORWARDS_TIMED = 5

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Outcome:
    """What became of one failure. ``reason`` says why it is not repaired, with advice; empty if it is.

    ``before`` and ``after`` are its mistakes under teacher forcing; ``after`` counts the repair's attempt
    even where that was undone.
    """

    failure: Failure
    tokens: Tokens
    before: tuple[Mistake, ...]
    after: tuple[Mistake, ...]
    reason: str = ""

    @property
    def failing(self) -> bool:
        return bool(self.before)

    @property
    def repaired(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Cost:
    """Time from the first diagnosis to the last teacher-forced check, and that in forward equivalents.

    A forward equivalent is the time of one plain forward pass over the same prompts and targets, on the
    same model, in the same run (median of five). ``check_seconds`` is the greedy decoding afterwards,
    ``statistics_seconds`` what gathering (or reading) statistics took once, before the first repair.
    """

    seconds: float
    forward_equivalents: float
    check_seconds: float
    steps: int
    statistics_seconds: float = 0.0


@dataclass(frozen=True)
class Repair:
    """The result: one outcome per failure, the patch (None if nothing was repaired), its drift and cost."""

    method: Method
    outcomes: tuple[Outcome, ...]
    patch: Patch | None
    drift: Drift | None
    cost: Cost

    @property
    def failing(self) -> int:
        return sum(outcome.failing for outcome in self.outcomes)

    @property
    def repaired(self) -> int:
        return sum(outcome.failing and outcome.repaired for outcome in self.outcomes)


def quiet(stage: str, done: int, total: int) -> None:
    """Report no progress."""


def repair(
    net: Net,
    failures: Sequence[Failure],
    method: Method | None = None,
    reference: Reference | None = None,
    progress: Progress = quiet,
    statistics: Statistics | None = None,
) -> Repair:
    """Repair all failures together in one patch, and leave the net with that patch applied.

    Whatever happens in between (an error, Ctrl-C), the net is either patched as the result says or as it
    was, bit for bit; it is as it was if nothing could be repaired. Failures that resist are reported
    with a reason, the others are kept. Drift is measured on ``reference`` (default: the shipped texts).
    A method that needs ``statistics`` of reference text has them gathered from text the model writes by
    itself, once for each model, unless they are given.

    Raises FailuresError for failures that contradict each other or do not fit the model.
    Source of the method's maths: arXiv 2503.12899.
    """
    for first, second in contradictions(failures):
        raise FailuresError(
            f"failures {first.id!r} and {second.id!r} want different targets for one prompt "
            f"({first.target!r}, {second.target!r}); no model can give both: keep one, or repair them --alone"
        )
    method = method or Star()
    known = _Known.of(net, method, statistics, progress)
    attempt = _attempt(net, failures, method, known, progress)
    if not attempt.repaired or not attempt.changes:
        return attempt.result(None)
    reference = reference or read_reference()
    patch = attempt.patch(net)
    (drift,) = measure_drift(net, [patch], reference, lambda done, total: progress("drift", done, total))
    patch = _recorded(patch, drift, reference)
    patch.apply(net)
    return replace(attempt.result(patch), drift=drift)


def repair_each(
    net: Net,
    failures: Sequence[Failure],
    method: Method | None = None,
    progress: Progress = quiet,
    statistics: Statistics | None = None,
) -> Iterator[Repair]:
    """Repair every failure alone from the untouched net (the papers' protocol), and leave the net untouched.

    Yields a Repair per failure, in order, without drift; its patch is the attempt's, whether or not it
    repaired the failure (None for a failure that was answered rightly, or an attempt that changed nothing).
    """
    method = method or Star()
    known = _Known.of(net, method, statistics, progress)
    for failure in failures:
        attempt = _attempt(net, [failure], method, known, progress)
        yield attempt.result(attempt.patch(net) if attempt.changes else None)


def with_drift(repair: Repair, drift: Drift, reference: Reference) -> Repair:
    """The repair with its patch's drift on a reference, written into the patch's record too."""
    if repair.patch is None:
        return repair
    return replace(repair, patch=_recorded(repair.patch, drift, reference), drift=drift)


def _recorded(patch: Patch, drift: Drift, reference: Reference) -> Patch:
    record = {"kl": drift.kl, "agreement": drift.agreement, "tokens": drift.tokens, "reference": reference.name}
    return replace(patch, made=replace(patch.made, drift=record))


@dataclass(frozen=True)
class _Attempt:
    """A repair that was tried, checked and undone again: everything a patch needs."""

    method: Method
    outcomes: tuple[Outcome, ...]
    changes: Mapping[int, Change]
    cost: Cost

    @property
    def repaired(self) -> bool:
        return any(outcome.failing and outcome.repaired for outcome in self.outcomes)

    def result(self, patch: Patch | None) -> Repair:
        return Repair(self.method, self.outcomes, patch, None, self.cost)

    def patch(self, net: Net) -> Patch:
        items = tuple(
            Item(
                outcome.tokens,
                outcome.failure.prompt or str([dict(message) for message in outcome.failure.messages]),
                outcome.failure.target,
                outcome.repaired,
                tuple((m.position, m.wanted, m.said, m.gap) for m in outcome.before),
                tuple((m.position, m.wanted, m.said, m.gap) for m in outcome.after),
                outcome.reason,
            )
            for outcome in self.outcomes
        )
        versions = {name: version(name) for name in ("lmrepair", "torch", "transformers")}
        made = Made(net.name, self.method.name, self.method.settings(), {}, versions)
        changed = {layer: change.columns for layer, change in self.changes.items()}
        return Patch(dict(self.changes), items, made, fingerprint(net, changed))


@dataclass(frozen=True)
class _Known:
    """What is made once for a net and a method: semantic bases, and the metric if the method asks for one."""

    bases: Bases
    metric: Metric | None
    seconds: float

    @staticmethod
    def of(net: Net, method: Method, statistics: Statistics | None, progress: Progress) -> _Known:
        bases = Bases.of(net, gain=bool(getattr(method, "gain", False)))
        asked, began = method.asks(), time.perf_counter()
        if asked is None:
            return _Known(bases, None, 0.0)
        if statistics is None:
            statistics = statistics_of(net, asked, progress=lambda done, total: progress("statistics", done, total))
        return _Known(bases, Metric.of(statistics, asked.damping), time.perf_counter() - began)


def _attempt(net: Net, failures: Sequence[Failure], method: Method, known: _Known, progress: Progress) -> _Attempt:
    """Diagnose, locate, solve, apply and check; the weights are as they were afterwards."""
    tokens = net.tokenize(failures)
    with settled(net.model):
        began = time.perf_counter()
        batches = net.batches(tokens)
        preference = net.prefer(batches)
        before = diagnoses(batches, preference)
        if not any(item.mistakes for item in before):
            return _nothing_to_do(net, failures, method, before, batches, time.perf_counter() - began)
        sites = method.sites(net, batches, preference)
        with Trial(net, sites) as trial:
            solver = _Solver(net, method, known, sites, trial, progress)
            solver.solve(tokens, before)
            seconds = time.perf_counter() - began
            after, greedy = solver.check(tokens)
            check_seconds = time.perf_counter() - began - seconds
            # In other company, or token by token, rounding can turn a near tie round.
            for _ in range(MARGIN_ROUNDS):
                if not solver.converged or all(greedy):
                    break
                solver.method = replace(solver.method, margin=solver.method.margin + SPARE_MARGIN)
                began = time.perf_counter() - seconds
                solver.solve(tokens, diagnoses(batches, net.prefer(batches), solver.method.margin))
                seconds = time.perf_counter() - began
                after, greedy = solver.check(tokens)
            changes = trial.changes(solver.deltas)
        outcomes = tuple(
            Outcome(failure, b.tokens, b.mistakes, a.mistakes, _reason(a, same, method, bool(b.mistakes)))
            for failure, b, a, same in zip(failures, before, after, greedy, strict=True)
        )
        equivalents = seconds / forward_seconds(net, batches)
        cost = Cost(seconds, equivalents, check_seconds, solver.steps, known.seconds)
        return _Attempt(method, outcomes, changes, cost)


def _nothing_to_do(
    net: Net, failures: Sequence[Failure], method: Method, found: list[Diagnosis], batches: list[Batch], seconds: float
) -> _Attempt:
    outcomes = tuple(Outcome(failure, item.tokens, (), ()) for failure, item in zip(failures, found, strict=True))
    return _Attempt(method, outcomes, {}, Cost(seconds, seconds / forward_seconds(net, batches), 0.0, 0))


def _reason(after: Diagnosis, greedy: bool, method: Method, failed: bool) -> str:
    if after.mistakes:
        count, total = len(after.mistakes), len(after.tokens.target)
        if not failed:
            return (
                f"right before, but {count} of {total} positions are mistaken with the patch; "
                "leave it out, or repair the failures --alone"
            )
        spent = f"after {method.epochs} epochs" + (" for each, which were undone" if method.undoes else "")
        return f"{count} of {total} positions are still mistaken {spent}; {method.advice}"
    return "" if greedy else "preferred at every position, but greedy decoding gives another text; try a larger margin"


def forward_seconds(net: Net, batches: Sequence[Batch]) -> float:
    """The time of one plain forward pass over the batches, median of five."""
    times = []
    with torch.inference_mode():
        for _ in range(FORWARDS_TIMED):
            began = time.perf_counter()
            for batch in batches:
                net.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
            if net.device.type == "cuda":
                torch.cuda.synchronize(net.device)
            times.append(time.perf_counter() - began)
    return median(times)


class _Solver:
    """Runs a method's steps on a trial, in the mode the method asks for, and keeps count."""

    def __init__(self, net: Net, method: Method, known: _Known, sites: Sites, trial: Trial, progress: Progress) -> None:
        self.net, self.method, self.known, self.sites = net, method, known, sites
        self.trial, self.progress = trial, progress
        # Adding −0 leaves every number as it is, −0 included; adding 0 would turn −0 into 0.
        self.deltas: Mapping[int, Tensor] = {
            layer: torch.full((len(columns), net.hidden), -0.0, device=net.device)
            for layer, columns in sites.columns.items()
        }
        self.steps = 0
        self.converged = False  # whether the last problem ended because nothing was left to do

    def solve(self, tokens: Sequence[Tokens], found: Sequence[Diagnosis]) -> None:
        """Work on the failures that have mistakes, in the method's mode."""
        if self.method.mode == "multi-failure" or len(tokens) == 1 and self.method.mode == "batch":
            self._run(self.net.batches(tokens))
            return
        work: Callable[[Tokens], None] = self._iterate if self.method.mode == "iterative" else self._one
        batches = self.net.batches(tokens)
        best, kept = -1, self.deltas
        for _ in range(self.method.rounds if self.method.early else 1):
            start = self.deltas
            for number, item in enumerate(found):
                self.progress("failures", number, len(found))
                if item.mistakes:
                    work(item.tokens)
            found = diagnoses(batches, self.net.prefer(batches), self.method.margin)
            right = sum(not item.mistakes for item in found)
            if right > best:
                best, kept = right, self.deltas
            self.converged = self.method.early and right == len(found)
            if self.converged:
                return
            if self.deltas is start:  # another round would do the same again
                break
        self.deltas = kept
        self.trial.write(kept)

    def _one(self, tokens: Tokens) -> None:
        self._run(self.net.batches([tokens]))

    def _iterate(self, tokens: Tokens) -> None:
        """One mistake after another, in the order of the target."""
        batches = self.net.batches([tokens])
        position, memory = 0, None
        while position < len(tokens.target):
            (found,) = diagnoses(batches, self.net.prefer(batches), self.method.margin)
            ahead = [mistake.position for mistake in found.mistakes if mistake.position >= position]
            if not ahead:
                return
            focus = torch.zeros(len(tokens.target), dtype=torch.bool, device=self.net.device)
            focus[ahead[0]] = True
            memory = self._run(batches, focus, memory)
            position = ahead[0] + 1

    def _run(self, batches: Sequence[Batch], focus: Tensor | None = None, earlier: Any = None) -> Any:
        """At most ``epochs`` steps on one problem; the best state of several failures is the one that stays.

        ``earlier`` is what the method remembers of the problem before; what it remembers now is returned.
        """
        method = self.method
        margin = method.margin if method.early else None
        rows = sum(len(batch.rows) for batch in batches)
        everywhere = torch.ones(rows, dtype=torch.bool, device=self.net.device)
        several = sum(len(batch.tokens) for batch in batches) > 1 and method.early
        start = self.deltas
        best, kept, memory = -1, start, earlier
        for step in range(method.epochs):
            self.progress("steps", step, method.epochs)
            reading = method.read(self.net, batches, self.sites, focus, margin, memory if step else None)
            if several:
                right = _right(batches, reading.preference)
                if right > best:
                    best, kept = right, self.deltas
            self.converged = reading.done
            if self.converged:
                return memory
            problem = Problem(
                self.net, tuple(batches), self.sites, reading, everywhere if focus is None else focus,
                self.deltas, self.known.bases, step, memory, self.known.metric,
            )  # fmt: skip
            answer = method.solve(problem)
            self.deltas, memory = answer.deltas, answer.memory
            self.trial.write(self.deltas)
            self.steps += 1
        if not several and not method.undoes:
            return memory
        now = self.net.prefer(batches)
        if method.undoes:
            kept, worse = start, not now.holds(focus, method.margin)
        else:
            worse = _right(batches, now) < best
        if worse:
            self.deltas = kept
            self.trial.write(kept)
        return earlier if worse and method.undoes else memory

    def check(self, tokens: Sequence[Tokens]) -> tuple[list[Diagnosis], list[bool]]:
        """Teacher-forced diagnosis of the patched net, and whether greedy decoding gives each target."""
        batches = self.net.batches(tokens)
        found = diagnoses(batches, self.net.prefer(batches))
        right = [item.tokens for item in found if not item.mistakes]
        made = iter(self.net.generate(right))
        return found, [not item.mistakes and next(made) == item.tokens.target for item in found]


def _right(batches: Sequence[Batch], preference: Preference) -> int:
    """How many failures are preferred at every position."""
    return sum(not item.mistakes for item in diagnoses(batches, preference))
