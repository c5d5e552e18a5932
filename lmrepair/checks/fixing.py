"""From failing tests to passing ones: find, get an answer the model can nearly give, repair, execute again."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

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
SEEDS = 1000  # between the seeds of one task and the next: each round of samples takes on as many as it has samples


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


def search(
    net: Net,
    tasks: Sequence[Task],
    checker: Checker,
    budget: Budget,
    seeds: Sequence[int],
    canonical: bool = False,
    progress: Progress = quiet,
) -> list[Search]:
    """For each task a completion that passes and that the model finds likely: its own sample, else the given one.

    Temperatures rise until some sample of a task passes. The tasks that are still looked for are sampled side by
    side and share a round's time. ``canonical``: the given solutions at once, without sampling.
    """
    hunts = [_Hunt(task, seed) for task, seed in zip(tasks, seeds, strict=True)]
    share = -(-budget.samples // len(budget.temperatures))
    counts = [min(budget.at_once, share - at) for at in range(0, share, budget.at_once)]
    rounds = () if canonical else [(heat, count) for heat in budget.temperatures for count in counts]
    progress("search", 0, len(hunts))
    for heat, most in rounds:
        going = [one for one in hunts if not one.passing and one.seconds <= budget.seconds]
        progress("search", len(hunts) - len(going), len(hunts))
        count = min([most, *(budget.samples - one.spent for one in going)])
        if going and count > 0:
            _sample(net, going, checker, budget.length, heat, count)
    return [hunt.found(net, checker) for hunt in hunts]


@dataclass
class _Hunt:
    """A search as it goes on: target → temperature of what passes, completion → verdict of what does not."""

    task: Task
    seed: int
    spent: int = 0
    seconds: float = 0.0
    passing: dict[str, float] = field(default_factory=dict)
    rejected: dict[str, Verdict] = field(default_factory=dict)

    def found(self, net: Net, checker: Checker) -> Search:
        """The likeliest that passes and that the tokenizer can write, else the given solution if that holds of it."""
        heats, given = self.passing, self.task.canonical
        cost, target = self._likeliest(net, list(heats))
        if target is not None:
            return self._end(target, "sample", cost, heats[target], len(heats))
        if not given:
            return self._end(None)
        verdict = checker.check(self.task, given)
        if not verdict.passed:
            self.rejected[given] = verdict
            return self._end(None)
        cost, target = self._likeliest(net, [given.rstrip() + CLOSING])
        return self._end(target, "canonical", cost, 0.0, 1) if target is not None else self._end(None)

    def _likeliest(self, net: Net, texts: Sequence[str]) -> tuple[float, str | None]:
        costs = nats(net, [self.task] * len(texts), texts)
        found = [(cost, text) for cost, text in zip(costs, texts, strict=True) if cost < math.inf]
        return min(found, key=lambda pair: pair[0], default=(0.0, None))

    def _end(
        self, target: str | None, source: str = "", cost: float = 0.0, heat: float = 0.0, passing: int = 0
    ) -> Search:
        wrong = tuple(self.rejected.items())
        return Search(target, source, cost, heat, self.spent, passing, self.seconds, wrong)


def _sample(net: Net, hunts: Sequence[_Hunt], checker: Checker, length: int, heat: float, count: int) -> None:
    """A round: ``count`` samples of each task, executed."""
    began = time.perf_counter()
    seeds = [hunt.seed + hunt.spent for hunt in hunts]
    written = write_samples(net, [hunt.task for hunt in hunts], count, length, heat, seeds)
    new = [
        (hunt, one)
        for hunt, texts in zip(hunts, written, strict=True)
        for one in {text.completion: text for text in texts}.values()
        if one.completion not in hunt.rejected
    ]
    verdicts = checker.check_all([(hunt.task, one.completion) for hunt, one in new])
    for (hunt, one), verdict in zip(new, verdicts, strict=True):
        if verdict.passed:
            hunt.passing[one.target] = heat
        else:
            hunt.rejected[one.completion] = verdict
    for hunt in hunts:
        hunt.spent += count
        hunt.seconds += (time.perf_counter() - began) / len(hunts)


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
    measured = list((groups or {}).values())
    before, *apart = _runs(net, [tasks, *measured], checker, budget.length, progress)
    clock.part("find")
    failing = [index for index, run in enumerate(before) if not run.verdict.passed]
    wanted, seeds = [tasks[index] for index in failing], [seed + SEEDS * index for index in failing]
    found = dict(zip(failing, search(net, wanted, checker, budget, seeds, canonical, progress), strict=True))
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
    after, second, *again = (
        _runs(net, [tasks, asked, *measured], checker, budget.length, progress) if changed else [before, first, *apart]
    )
    clock.part("execute")
    both = zip(first, second, strict=True)
    pairs = {index: {rule: next(both) for rule in worded[index]} for index in reached}
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
    joined = [tuple(zip(*part, strict=True)) for part in zip(measured, apart, again, strict=True)]
    return Fixed(items, result, dict(zip(groups or {}, joined, strict=True)), clock.seconds)


def _runs(
    net: Net, parts: Sequence[Sequence[Task]], checker: Checker, length: int, progress: Progress
) -> list[list[Run]]:
    """The runs of each part, all of them written and executed together."""
    found = iter(runs(net, [task for part in parts for task in part], checker, length, progress))
    return [list(islice(found, len(part))) for part in parts]


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
