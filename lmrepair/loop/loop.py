"""The loop: diagnose → locate → solve → apply → check → gate → keep or undo. The file to read first."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import pairwise

from lmrepair.diagnosis import Diagnosis, diagnoses, listening
from lmrepair.errors import FailuresError, UsageError
from lmrepair.failures import Failure, Reference, Tokens, Wordings, contradictions, listed, read_reference
from lmrepair.loop.case import Case, forward_seconds
from lmrepair.loop.gate import Gate
from lmrepair.loop.judge import Guard, Scaled
from lmrepair.loop.outcome import Cost, Outcome, Repair, recorded, with_drift
from lmrepair.loop.search import Gated, Search, Solved, best_of, gated, why
from lmrepair.loop.solver import Known, Solver, first_reading, say_memory
from lmrepair.loop.untouched import Measured, Untouched, read_fully
from lmrepair.methods import Method, MinKl
from lmrepair.model import (
    Change,
    Edit,
    Fingerprint,
    Net,
    Progress as Progress,
    Statistics,
    Trial,
    fingerprint,
    give_back,
    quiet,
    settled,
    uninterrupted,
)
from lmrepair.patch import Item, Made, Patch

MARGIN_ROUNDS = 3  # at most, where the check finds another token than the loop did
SPARE_MARGIN = 0.1  # logits asked for in addition in each of them


def repair(
    net: Net,
    failures: Sequence[Failure],
    method: Method | None = None,
    reference: Reference | None = None,
    progress: Progress = quiet,
    statistics: Statistics | None = None,
    gate: Gate | None = None,
    wordings: Wordings | None = None,
    drift: str = "quick",
) -> Repair:
    """Repair all failures together in one patch, and leave the net with that patch applied.

    Whatever happens in between (an error, Ctrl-C), the net is either patched as the result says or as it
    was, bit for bit; it is as it was if nothing could be repaired. Failures that resist are reported
    with a reason, the others are kept. Drift is measured on ``reference`` (default: the shipped texts): "quick"
    reads the beginning of each text, with a gate as far as it takes to decide; "full" all of them.
    A method that needs ``statistics`` of reference text has them gathered, unless they are given: from text the
    model writes by itself, once for each model, and (minkl) from other requests under the failures' template or in
    their chats, once for each form.

    ``wordings``: other prompts that are solved together with the failures, so that the repair carries over;
    whether they come out right in the end is not part of the result.

    With a ``gate`` the patch is kept only if it passes; it is shrunk until it does, or made again without
    the failures that cost most. Without one, any patch that repairs something is kept.

    Raises FailuresError for failures that contradict each other, what the gate protects, or do not fit the
    model; WrongModelError for a gate's memory of another model.
    Source of the method's maths: arXiv 2503.12899.
    """
    failures = listed(failures)
    for first, second in contradictions(failures):
        raise FailuresError(
            f"failures {first.id!r} and {second.id!r} want different targets for one prompt "
            f"({first.target!r}, {second.target!r}); no model can give both: keep one, or repair them --alone"
        )
    method, full = _method(method), read_fully(drift)
    known = Known.of(net, method.suited(net, len(failures)), failures, statistics, progress)
    case, began = Case.of(net, failures), time.perf_counter()
    model = fingerprint(net, {})
    named = time.perf_counter() - began
    guard = Guard.of(net, gate, reference, case.tokens, full, model) if gate is not None else None
    attempt = _kept(case, method, known, guard, progress, wordings)
    if not attempt.repaired or not attempt.changes:
        return attempt.result(None)
    reference = reference or read_reference()
    times = [time.perf_counter()]
    patch = attempt.patch(net, model)
    times.append(time.perf_counter())
    measured = attempt.measured
    if guard is None or measured is None or not guard.untouched.covers(reference):
        progress("drift", 0, 1)
        measured = Untouched.of(net, [reference], full, model).measure(patch)
    times.append(time.perf_counter())
    patch = recorded(patch, measured.drift, reference)
    try:
        patch.apply(net)
        made, read, applied = (later - earlier for earlier, later in pairwise([*times, time.perf_counter()]))
        spent = attempt.cost.patch_seconds + named + made + applied
        cost = replace(attempt.cost, drift_seconds=read, patch_seconds=spent)
        return replace(attempt.result(patch), drift=measured.drift, cost=cost)
    except BaseException:
        with uninterrupted():  # nobody has the patch yet to take it back with
            if patch.is_applied(net):
                patch.revert(net)
        raise


def repair_each(
    net: Net,
    failures: Sequence[Failure],
    method: Method | None = None,
    progress: Progress = quiet,
    statistics: Statistics | None = None,
    gate: Gate | None = None,
    wordings: Wordings | None = None,
    drift: str = "quick",
    reference: Reference | None = None,
) -> Iterator[Repair]:
    """Repair every failure alone from the untouched net (the papers' protocol), and leave the net untouched.

    Yields a Repair per failure, in order; its patch is the attempt's, whether or not it
    repaired the failure (None for a failure that was answered rightly, or an attempt that changed nothing).
    With a ``gate``, each patch has to pass it on its own: there is a patch only where it does, and ``drift`` says how
    KL is measured, as for ``repair``. Drift is measured where there is a ``reference``; the gate's own measurement is
    taken where it reads these texts.
    """
    method = _method(method)
    full = read_fully(drift)
    known = Known.of(net, method.suited(net, 1), failures, statistics, progress)
    model = fingerprint(net, {})
    guard = Guard.of(net, gate, None, net.tokenize(failures), full, model) if gate is not None else None
    untouched = guard.untouched if guard is not None else None
    covered = untouched is not None and reference is not None and untouched.covers(reference)
    if reference is not None and not covered:
        untouched = Untouched.of(net, [reference], full, model)
    for failure in failures:
        attempt = _kept(Case.of(net, [failure]), method, known, guard, progress, wordings)
        began = time.perf_counter()
        patch = attempt.patch(net, model) if attempt.changes else None
        result, made = attempt.result(patch), time.perf_counter()
        if patch is not None and reference is not None and untouched is not None:
            measured = (attempt.measured if covered else None) or untouched.measure(patch)
            result = with_drift(result, measured.drift, reference)
        read = time.perf_counter() - made
        cost = replace(attempt.cost, patch_seconds=attempt.cost.patch_seconds + made - began, drift_seconds=read)
        yield replace(result, cost=cost)


def _method(given: Method | None) -> Method:
    if given is not None and not isinstance(given, Method):
        raise UsageError(f"method is {given!r}; expected a value, MinKl(margin=3.0) say")
    return given or MinKl()


@dataclass(frozen=True)
class _Attempt:
    """A repair that was tried, checked and undone again: everything a patch needs, and what the gate measured of it."""

    method: Method
    outcomes: tuple[Outcome, ...]
    changes: Mapping[int, Edit]
    cost: Cost
    gate: Gated | None = None
    wordings: Wordings | None = None
    measured: Measured | None = None

    @property
    def repaired(self) -> bool:
        return any(outcome.failing and outcome.repaired for outcome in self.outcomes)

    def result(self, patch: Patch | None) -> Repair:
        return Repair(self.method, self.outcomes, patch, None, self.cost, self.gate)

    def patch(self, net: Net, model: Fingerprint) -> Patch:
        """``model``: the fingerprint of the net as it is."""
        items = tuple(
            Item(
                outcome.tokens,
                outcome.failure.shown,
                outcome.failure.target,
                outcome.repaired,
                tuple((m.position, m.wanted, m.said, m.gap) for m in outcome.before),
                tuple((m.position, m.wanted, m.said, m.gap) for m in outcome.after),
                outcome.reason,
            )
            for outcome in self.outcomes
        )
        versions = {name: version(name) for name in ("lmrepair", "torch", "transformers")}
        gate = self.gate.data() if self.gate is not None else {}
        settings = {**self.method.settings(), **(self.wordings.data() if self.wordings else {})}
        made = Made(net.name, self.method.name, settings, {}, versions, gate, net.source.data())
        changed = {layer: change.columns for layer, change in self.changes.items() if isinstance(change, Change)}
        return Patch(dict(self.changes), items, made, fingerprint(net, changed, model))


def _kept(
    case: Case,
    method: Method,
    known: Known,
    guard: Guard | None,
    progress: Progress,
    wordings: Wordings | None,
) -> _Attempt:
    """The attempt that passes the gate, at the scale and with the failures that it passes with."""
    if guard is None:
        return _attempt(case, method, known, progress, wordings)
    attempts: list[_Attempt] = []
    solving = 0.0

    def solve(chosen: Sequence[int], kept: Sequence[Tokens]) -> Solved:
        nonlocal solving
        start = time.perf_counter()
        attempt = _attempt(case.only(chosen), method, known, progress, wordings, kept)
        solving += time.perf_counter() - start
        attempts.append(attempt)
        found = list(zip(chosen, attempt.outcomes, strict=True))
        fixed = tuple(index for index, outcome in found if outcome.failing and outcome.repaired)
        return Solved(attempt.changes, fixed, tuple(index for index, outcome in found if not outcome.failing))

    began = time.perf_counter()
    runs = Search(guard, case.tokens, solve, lambda number: progress("gate", number - 1, number)).run()
    first, best = attempts[0], best_of(runs)
    record = gated(guard, runs, best)
    changes = Scaled(best.solved.changes, record.scale).made(case.net) if best is not None else {}
    outcomes = first.outcomes
    if runs[0].judged is not None and not (best is runs[0] and record.scale == 1):
        with Scaled(changes, 1.0).on(case.net):
            after, greedy = case.check()
        outcomes = _gated_outcomes(first.outcomes, after, greedy, method, why(runs, best))
    lost = [now.tokens.id for old, now in zip(first.outcomes, outcomes, strict=True) if old.repaired > now.repaired]
    cost = replace(_sum_of(attempts), gate_seconds=time.perf_counter() - began - solving)
    measured = best.judged.verdict.measured if best is not None and best.judged is not None else None
    # Settings that were left to what is asked stand in the attempt that is kept.
    used = next((attempt for run, attempt in zip(runs, attempts, strict=True) if run is best), first).method
    return _Attempt(used, outcomes, changes, cost, replace(record, dropped=tuple(lost)), wordings, measured)


def _gated_outcomes(
    first: Sequence[Outcome], after: Sequence[Diagnosis], greedy: Sequence[bool], method: Method, refusal: str
) -> tuple[Outcome, ...]:
    """What became of the failures with exactly the patch that is kept; without one, with the net as it was."""
    found = []
    for old, now, same in zip(first, after, greedy, strict=True):
        reason = _reason(now, same, method, old.failing)
        found.append(
            replace(old, after=now.mistakes, reason=refusal if reason and old.failing and old.repaired else reason)
        )
    return tuple(found)


def _attempt(
    case: Case,
    method: Method,
    known: Known,
    progress: Progress,
    wordings: Wordings | None,
    kept: Sequence[Tokens] = (),
) -> _Attempt:
    """Diagnose, locate, solve, apply and check; the weights are as they were afterwards.

    ``kept`` holds now and takes part in the solve, so that the method repairs it where it breaks.
    """
    net, began = case.net, time.perf_counter()
    with settled(net.model):
        others = wordings.of(case.failures, net.tokenize) if wordings else []
        rows = [*case.tokens, *others, *kept]
        method = method.suited(net, len(rows))
        # What is solved is all that is diagnosed: then the first step's reading tells the mistakes as well.
        with listening(net, case.batches) as heard:
            first = first_reading(net, method, case.batches, progress) if len(rows) == len(case.tokens) else None
            preference = first.preference if first else net.prefer(case.batches)
        before = case.diagnose(preference)
        if not any(item.mistakes for item in before):
            return _nothing_to_do(case, method, before, time.perf_counter() - began)
        sites = method.sites(net, case.batches, preference)
        if first is None:
            say_memory(net, method, rows, sites, progress)
        with Trial(net, sites) as trial:
            solver = Solver(net, method, known, sites, trial, progress, heard, first)
            del first
            batches = case.batches if rows == [*case.tokens] else net.batches(rows)
            worded = diagnoses(more := net.batches(others), net.prefer(more)) if others else []
            solver.solve(batches, [*before, *worded, *(Diagnosis(item, ()) for item in kept)])
            seconds = time.perf_counter() - began
            after, greedy = case.check(solver.preferred if batches is case.batches else None)
            check_seconds = time.perf_counter() - began - seconds
            # In other company, or token by token, rounding can turn a near tie round.
            for _ in range(MARGIN_ROUNDS):
                if not solver.converged or all(greedy):
                    break
                solver.method = replace(solver.method, margin=solver.method.margin + SPARE_MARGIN)
                began = time.perf_counter() - seconds
                solver.solve(batches, diagnoses(batches, solver.now(batches), solver.method.margin))
                seconds = time.perf_counter() - began
                after, greedy = case.check()
            began = time.perf_counter()
            changes = trial.changes(solver.deltas)
            made = time.perf_counter() - began
        outcomes = tuple(
            Outcome(
                failure, b.tokens, b.mistakes, a.mistakes, _reason(a, same, method, bool(b.mistakes), solver.stopped)
            )
            for failure, b, a, same in zip(case.failures, before, after, greedy, strict=True)
        )
        equivalents = seconds / forward_seconds(net, case.batches)
        cost = Cost(seconds, equivalents, check_seconds, solver.steps, known.seconds, patch_seconds=made)
        give_back()
        return _Attempt(method, outcomes, changes, cost, wordings=wordings)


def _nothing_to_do(case: Case, method: Method, found: list[Diagnosis], seconds: float) -> _Attempt:
    outcomes = tuple(Outcome(failure, item.tokens, (), ()) for failure, item in zip(case.failures, found, strict=True))
    return _Attempt(method, outcomes, {}, Cost(seconds, seconds / forward_seconds(case.net, case.batches), 0.0, 0))


def _reason(after: Diagnosis, greedy: bool, method: Method, failed: bool, stopped: str = "") -> str:
    if after.mistakes:
        count, total = len(after.mistakes), len(after.tokens.target)
        if not failed:
            return (
                f"right before, but {count} of {total} positions are mistaken with the patch; "
                "leave it out, or repair the failures --alone"
            )
        if stopped:
            return f"{count} of {total} positions are still mistaken; {stopped}"
        spent = f"after {method.epochs} epochs" + (" for each, which were undone" if method.undoes else "")
        return f"{count} of {total} positions are still mistaken {spent}; {method.advice}"
    return "" if greedy else "preferred at every position, but greedy decoding gives another text; try a larger margin"


def _sum_of(attempts: Sequence[_Attempt]) -> Cost:
    costs = [attempt.cost for attempt in attempts]
    names = ("seconds", "forward_equivalents", "check_seconds", "steps", "patch_seconds")
    total = {name: sum(getattr(cost, name) for cost in costs) for name in names}
    return replace(costs[0], **total)
