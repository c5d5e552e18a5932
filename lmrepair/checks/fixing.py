"""From failing tests to passing ones: find, get an answer the model can nearly give, repair, execute again."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lmrepair.checks.rewording import reworded
from lmrepair.checks.running import Checker, Verdict
from lmrepair.checks.sampling import Written, nats, write_greedy, write_samples
from lmrepair.checks.tasks import Task
from lmrepair.errors import UsageError
from lmrepair.failures import Protected, Reference
from lmrepair.loop import Gate, Repair, repair
from lmrepair.methods import Method
from lmrepair.model import Net, Progress, quiet

CLOSING = "\n"  # what ends a canonical solution


@dataclass(frozen=True)
class Budget:
    """What may be spent on a task: ``samples`` over the ``temperatures`` in turn, ``seconds`` of sampling (wall
    time), ``length`` in tokens of a completion; ``at_once``: samples side by side.
    """

    samples: int = 32
    seconds: float = 120.0
    temperatures: tuple[float, ...] = (0.3, 0.6, 0.9, 1.2)
    length: int = 128
    at_once: int = 8

    def __post_init__(self) -> None:
        if not self.temperatures or not all(value > 0 for value in self.temperatures):
            raise UsageError(f"temperatures {self.temperatures}; expected one or more, each above 0")
        for name in ("samples", "seconds", "length", "at_once"):
            if getattr(self, name) < (0 if name == "samples" else 1):
                raise UsageError(f"{name} is {getattr(self, name)}; expected at least 1 (samples: 0)")


@dataclass(frozen=True)
class Run:
    """A greedy completion with its verdict."""

    written: Written
    verdict: Verdict


@dataclass(frozen=True)
class Search:
    """What was looked for a task's target: ``target`` (None: out of reach), its ``source`` (``sample``,
    ``canonical``), how unlikely the model finds it (``nats``), the ``temperature`` it came up at.

    ``samples``, ``seconds``: what was spent. ``rejected``: other completions with their verdicts.
    """

    target: str | None
    source: str = ""
    nats: float = 0.0
    temperature: float = 0.0
    samples: int = 0
    passing: int = 0
    seconds: float = 0.0
    rejected: tuple[tuple[str, Verdict], ...] = ()


@dataclass(frozen=True)
class Item:
    """A task through the fix. ``search``: None for a task that passed. ``others``: rule → runs before and after."""

    task: Task
    before: Run
    after: Run
    search: Search | None = None
    reason: str = ""
    others: Mapping[str, tuple[Run, Run]] = field(default_factory=dict)

    @property
    def in_reach(self) -> bool:
        return self.search is not None and self.search.target is not None

    @property
    def repaired(self) -> bool:
        return not self.before.verdict.passed and self.after.verdict.passed

    @property
    def broken(self) -> bool:
        return self.before.verdict.passed and not self.after.verdict.passed


@dataclass(frozen=True)
class Fixed:
    """The result: an item a task, the repair (None: nothing was in reach), other tasks by group as pairs of runs
    before and after, and wall seconds by part.
    """

    items: tuple[Item, ...]
    repair: Repair | None
    groups: Mapping[str, tuple[tuple[Task, Run, Run], ...]]
    seconds: Mapping[str, float]

    @property
    def all_right(self) -> bool:
        """Whether all that were in reach pass, and nothing that passed fails."""
        return all(item.after.verdict.passed for item in self.items if item.in_reach) and not any(
            item.broken for item in self.items
        )


def runs(net: Net, tasks: Sequence[Task], checker: Checker, length: int, progress: Progress = quiet) -> list[Run]:
    """Each task's greedy completion, executed."""
    written = write_greedy(net, tasks, length, lambda done, total: progress("write", done, total))
    pairs = [(task, text.completion) for task, text in zip(tasks, written, strict=True)]
    verdicts = checker.check_all(pairs, lambda done, total: progress("execute", done, total))
    return [Run(text, verdict) for text, verdict in zip(written, verdicts, strict=True)]


def search(net: Net, task: Task, checker: Checker, budget: Budget, seed: int = 0, canonical: bool = False) -> Search:
    """Look for a completion that passes and that the model finds likely: its own sample, else the canonical one.

    Temperatures rise until some sample passes. ``canonical``: the given solution first, without sampling.
    """
    began = time.perf_counter()
    passing: dict[str, float] = {}
    rejected: dict[str, Verdict] = {}
    targets: dict[str, str] = {}
    spent = 0
    share = -(-budget.samples // len(budget.temperatures))
    for temperature in () if canonical else budget.temperatures:
        at_this = 0
        while at_this < min(share, budget.samples - spent + at_this) and not passing:
            if time.perf_counter() - began > budget.seconds:
                break
            count = min(budget.at_once, share - at_this, budget.samples - spent)
            if count < 1:
                break
            written = write_samples(net, task, count, budget.length, temperature, seed + spent)
            spent, at_this = spent + count, at_this + count
            new = {one.completion: one.target for one in written if one.completion not in rejected}
            verdicts = checker.check_all([(task, text) for text in new])
            rejected |= {text: found for text, found in zip(new, verdicts, strict=True) if not found.passed}
            passing |= {text: temperature for text, found in zip(new, verdicts, strict=True) if found.passed}
            targets |= new
        if passing:
            break
    wrong = tuple(rejected.items())
    texts = [targets[text] for text in passing]
    costs = nats(net, [task] * len(texts), texts)
    if texts and min(costs) < float("inf"):
        best = min(range(len(texts)), key=costs.__getitem__)
        heat = list(passing.values())[best]
        took = time.perf_counter() - began
        return Search(texts[best], "sample", costs[best], heat, spent, len(texts), took, wrong)
    return _canonical(net, task, checker, Search(None, samples=spent, rejected=wrong), began)


def _canonical(net: Net, task: Task, checker: Checker, tried: Search, began: float) -> Search:
    """The given solution, where there is one, it passes, and the tokenizer can write it."""
    if task.canonical:
        verdict = checker.check(task, task.canonical)
        target = task.canonical.rstrip() + CLOSING
        (cost,) = nats(net, [task], [target])
        if verdict.passed and cost < float("inf"):
            tried = replace(tried, target=target, source="canonical", nats=cost, passing=1)
        elif not verdict.passed:
            tried = replace(tried, rejected=(*tried.rejected, (task.canonical, verdict)))
    return replace(tried, seconds=time.perf_counter() - began)


def fix(
    net: Net,
    tasks: Sequence[Task],
    checker: Checker,
    budget: Budget | None = None,
    method: Method | None = None,
    gate: Gate | None = None,
    reference: Reference | None = None,
    groups: Mapping[str, Sequence[Task]] | None = None,
    *,
    others: bool = True,
    canonical: bool = False,
    seed: int = 0,
    progress: Progress = quiet,
) -> Fixed:
    """Repair what fails its tests, and leave the net with the patch applied (or as it was).

    What passed before is protected token by token, up to where it ends. ``groups``: other tasks that are measured
    before and after and not repaired. ``others``: repaired tasks are also asked in other words. ``canonical``: aim
    at the given solutions, not at samples.
    """
    budget, clock = budget or Budget(), _Clock()
    before = runs(net, tasks, checker, budget.length, progress)
    apart = {name: runs(net, group, checker, budget.length, progress) for name, group in (groups or {}).items()}
    clock.part("find")
    failing = [index for index, run in enumerate(before) if not run.verdict.passed]
    found: dict[int, Search] = {}
    for number, index in enumerate(failing):
        progress("search", number, len(failing))
        found[index] = search(net, tasks[index], checker, budget, seed + 1000 * index, canonical)
    clock.part("search")
    reached = [index for index in failing if found[index].target is not None]
    worded = {index: reworded(tasks[index]) if others else {} for index in reached}
    asked = [task for index in reached for task in worded[index].values()]
    first = runs(net, asked, checker, budget.length, progress)
    clock.part("execute")
    kept = [index for index in range(len(tasks)) if index not in found]
    result = None
    if reached:
        gate = gate or Gate()
        protect = tuple(protected(tasks[index], before[index].written) for index in kept)
        gate = replace(gate, protect=(*gate.protect, *protect))
        failures = [tasks[index].failure(str(found[index].target)) for index in reached]
        result = repair(net, failures, method, reference, progress, None, gate)
    clock.part("repair")
    changed = result is not None and result.patch is not None
    after = runs(net, tasks, checker, budget.length, progress) if changed else before
    again = {name: runs(net, group, checker, budget.length, progress) if changed else apart[name]
             for name, group in (groups or {}).items()}  # fmt: skip
    second = iter(
        list(zip(first, runs(net, asked, checker, budget.length, progress) if changed else first, strict=True))
    )
    clock.part("execute")
    pairs = {index: {rule: next(second) for rule in worded[index]} for index in reached}
    reasons = dict(zip(reached, result.outcomes, strict=True)) if result else {}
    items = tuple(
        Item(
            task,
            before[index],
            after[index],
            found.get(index),
            _reason(found.get(index), after[index], reasons[index].reason if index in reasons else ""),
            pairs.get(index, {}),
        )
        for index, task in enumerate(tasks)
    )
    joined = {name: tuple(zip(group, apart[name], again[name], strict=True)) for name, group in (groups or {}).items()}
    return Fixed(items, result, joined, clock.seconds)


def protected(task: Task, written: Written) -> Protected:
    """A completion that passes, to be written as it is now up to where it ends, token by token."""
    return Protected(task.failure(""), max(1, written.tokens))


def _reason(tried: Search | None, after: Run, refused: str) -> str:
    """Why a task that failed still does; empty if it does not."""
    if tried is None or after.verdict.passed:
        return ""
    if tried.target is None:
        return f"out of reach: none of {tried.samples} samples passes in {tried.seconds:.0f} s, no canonical solution"
    return refused or "the target is repaired, but what is written does not pass"


class _Clock:
    """Wall seconds by part; a part's name may come again."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def part(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
