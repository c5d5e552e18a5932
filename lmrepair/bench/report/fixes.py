"""Results of ``lmrepair fix --json`` read and checked: what their page is made from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmrepair.errors import ResultsError
from lmrepair.measure import Interval, visible

KEY = "passing_before"  # what a result of fix has and a bench's cell has not
GROUPS = (
    ("other_wordings", "repaired tasks, reworded by rule"),
    ("wordings", "the tasks in other words, as written"),
    ("held_out", "held-out tasks"),
)


@dataclass(frozen=True)
class Ran:
    """A completion with its outcome: ``label`` is the kind, of exceptions the type; ``detail`` what was said."""

    completion: str
    label: str
    detail: str

    @property
    def passed(self) -> bool:
        return self.label == "passed"


@dataclass(frozen=True)
class Aim:
    """The answer aimed at. ``source``: sample (at a ``temperature``), or canonical. ``nats``: how unlikely it was."""

    text: str
    source: str
    nats: float
    temperature: float | None


@dataclass(frozen=True)
class Task:
    """A task through the fix. ``aim``: None where it passed, or was out of reach. ``wordings``: rule, before, after."""

    id: str
    prompt: str
    before: Ran
    after: Ran
    aim: Aim | None
    reason: str
    samples: int
    passing: int
    rejected: tuple[Ran, ...]
    wordings: tuple[tuple[str, Ran, Ran], ...]


@dataclass(frozen=True)
class Group:
    """Tasks that were measured and not repaired: how many passed before and after, the paired difference."""

    title: str
    tasks: int
    before: int
    after: int
    difference: Interval


@dataclass(frozen=True)
class Fix:
    """One result of ``fix``, as its file says."""

    name: str
    model: str
    method: str
    sandbox: str
    tasks: tuple[Task, ...]
    groups: tuple[Group, ...]
    counts: Mapping[str, int]
    drift: Mapping[str, float]
    kinds: tuple[tuple[str, float], ...]
    seconds: Mapping[str, float]
    cost: Mapping[str, float]


def read_fixes(paths: Sequence[Path]) -> list[Fix]:
    """The results in order. Raises ResultsError for a file that is damaged or no result of ``fix``."""
    return [_read(path) for path in paths]


def is_fix(path: Path) -> bool:
    """Whether a file may be a result of ``fix``; what cannot be read is for others to refuse."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and KEY in record


def _read(path: Path) -> Fix:
    try:
        return _fix(path.name.removesuffix(".json"), json.loads(path.read_bytes()))
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ResultsError(
            f"{path}: no result of lmrepair fix that this version can read ({type(error).__name__}: {error}); "
            "expected what lmrepair fix --json prints"
        ) from error


def _fix(name: str, record: Mapping[str, Any]) -> Fix:
    cost, drift, gate = record["cost"], record["drift"] or {}, record["gate"] or {}
    counts = ("tasks", KEY, "in_reach", "repaired", "broken", "passing_after")
    kinds = [(_line(kind), _number(kl)) for kind, kl in gate.get("kl", {}).items()]
    return Fix(
        name=_line(name),
        model=_line(record["model"]),
        method=_line(record["method"] or "none"),
        sandbox=_line(record["sandbox"]),
        tasks=tuple(_task(item) for item in record["items"]),
        groups=tuple(_group(title, record[key]) for key, title in GROUPS if record.get(key)),
        counts={key: int(_number(record[key])) for key in counts},
        drift={_line(key): _number(value) for key, value in drift.items()},
        kinds=tuple(sorted(kinds, key=lambda pair: (-pair[1], pair[0]))),
        seconds={_line(key): _number(value) for key, value in cost["seconds"].items()},
        cost={_line(key): _number(value) for key, value in cost.items() if key != "seconds"},
    )


def _task(item: Mapping[str, Any]) -> Task:
    tried = item["tried"] or {"samples": 0, "passing": 0, "rejected": []}
    return Task(
        id=_line(item["id"]),
        prompt=_prompt(item["prompt"]),
        before=_ran(item["before"]),
        after=_ran(item["after"]),
        aim=None if item["target"] is None else _aim(item["target"]),
        reason=_line(item["reason"]),
        samples=int(_number(tried["samples"])),
        passing=int(_number(tried["passing"])),
        rejected=tuple(_ran(one) for one in tried["rejected"]),
        wordings=tuple(
            (_line(rule), _ran(both["before"]), _ran(both["after"])) for rule, both in item["wordings"].items()
        ),
    )


def _prompt(prompt: Any) -> str:
    """The prompt's text; a chat's turns one below the other."""
    if isinstance(prompt, list):
        return "\n".join(f"{_text(turn['role'])}: {_text(turn['content'])}" for turn in prompt)
    return _text(prompt)


def _ran(found: Mapping[str, Any]) -> Ran:
    kind, detail = _line(found["outcome"]["kind"]), _line(found["outcome"]["detail"])
    label = detail.partition(":")[0] if kind == "exception" else kind
    return Ran(_text(found["completion"]), label, detail)


def _aim(found: Mapping[str, Any]) -> Aim:
    heat = found.get("temperature")
    return Aim(
        _text(found["text"]),
        _line(found["source"]),
        _number(found["nats"]),
        None if heat is None else _number(heat),
    )


def _group(title: str, found: Mapping[str, Any]) -> Group:
    mean, low, high = (_number(found["difference"][key]) for key in ("mean", "low", "high"))
    tasks, before, after = (int(_number(found[key])) for key in ("tasks", "before", "after"))
    return Group(title, tasks, before, after, Interval(mean, low, high, tasks))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"found {type(value).__name__}, expected a number")
    if not math.isfinite(value):
        raise ValueError(f"{value} is no finite number")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"found {type(value).__name__}, expected text")
    return value


def _line(value: Any) -> str:
    """Text that stands in a line of its own: what does not print is spelled out."""
    return visible(_text(value), None)
