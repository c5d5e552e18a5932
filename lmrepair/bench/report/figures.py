"""Figures over failures: means with bootstrap intervals, and paired differences and ratios between methods."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lmrepair.bench.report.results import Result, Row
from lmrepair.measure import Interval, bootstrap, paired

RESAMPLES = 2000


@dataclass(frozen=True)
class Measure:
    """A number of a failure's record and how it is shown. ``better``: 1 where more is, −1 where less is, 0: neither."""

    key: str
    title: str
    scale: float = 1.0
    digits: int = 1
    unit: str = ""
    better: int = 1


@dataclass(frozen=True)
class Shown:
    """A figure as a table shows it: the text, its interval, and how it stands ("better", "worse" or "")."""

    text: str
    small: str = ""
    stands: str = ""


NOTHING = Shown("–")


@dataclass(frozen=True)
class Group:
    """The failures of one method in one place of a table: cells that differ in their seed alone."""

    name: str
    results: tuple[Result, ...]

    @property
    def first(self) -> Result:
        return self.results[0]

    @property
    def rows(self) -> list[Row]:
        return [row for result in self.results for row in result.rows]

    def values(self, key: str) -> dict[tuple[int, str], float]:
        """The values of a measure by (seed, failure's id), where it was measured."""
        return {
            (result.seed, row.id): row.values[key]
            for result in self.results
            for row in result.rows
            if key in row.values
        }

    def mean(self, key: str) -> Interval | None:
        found = self.values(key)
        return bootstrap(list(found.values()), resamples=RESAMPLES) if found else None


def groups(results: Sequence[Result]) -> list[Group]:
    """One group a method and targeting, in the grid's order."""
    found: dict[str, list[Result]] = {}
    for result in results:
        aim = ", ".join(f"{key} {value}" for key, value in result.targeting.items())
        found.setdefault(result.method + (f" ({aim})" if aim else ""), []).append(result)
    return [Group(name, tuple(members)) for name, members in found.items()]


def reference(found: Sequence[Group]) -> Group | None:
    """What others are compared with: STAR with its default settings, else the first STAR."""
    stars = [group for group in found if group.first.base == "star"]
    plain = [group for group in stars if group.first.preset is None]
    return next(iter(plain or stars), None)


def pairs(group: Group, other: Group, key: str) -> tuple[list[float], list[float]]:
    """The values of a measure on the failures that both have."""
    mine, theirs = group.values(key), other.values(key)
    both = [at for at in mine if at in theirs]
    return [mine[at] for at in both], [theirs[at] for at in both]


def difference(group: Group, other: Group, key: str) -> Interval | None:
    mine, theirs = pairs(group, other, key)
    return paired(mine, theirs, resamples=RESAMPLES) if mine else None


def times(group: Group, other: Group, key: str) -> Interval | None:
    """How many times the other's value: the geometric mean of the ratios, failure by failure."""
    mine, theirs = pairs(group, other, key)
    both = [(math.log(a), math.log(b)) for a, b in zip(mine, theirs, strict=True) if a > 0 < b]
    if not both:
        return None
    found = paired([a for a, _ in both], [b for _, b in both], resamples=RESAMPLES)
    return Interval(math.exp(found.mean), math.exp(found.low), math.exp(found.high), found.count)


def ratio_of_means(group: Group, other: Group, key: str) -> Interval | None:
    """mean / other's mean − 1, with its bootstrap over the failures that both have."""
    import numpy as np

    mine, theirs = pairs(group, other, key)
    if not mine or not any(theirs):
        return None
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, len(mine), (RESAMPLES, len(mine)))
    below = np.asarray(theirs)[drawn].mean(axis=1)
    made = np.asarray(mine)[drawn].mean(axis=1)[below > 0] / below[below > 0] - 1
    low, high = np.quantile(made, [0.025, 0.975])
    return Interval(float(np.mean(mine) / np.mean(theirs) - 1), float(low), float(high), len(mine))


def shown(found: Interval | None, measure: Measure) -> Shown:
    """A mean with its interval."""
    if found is None:
        return NOTHING
    return Shown(number(found.mean, measure), f"{number(found.low, measure)} to {number(found.high, measure)}")


def compared(found: Interval | None, measure: Measure) -> Shown:
    """A difference with its interval and whether that leaves zero out."""
    if found is None:
        return NOTHING
    signed = [f"{'+' if value > 0 else ''}{number(value, measure)}" for value in (found.mean, found.low, found.high)]
    return Shown(signed[0], f"{signed[1]} to {signed[2]}", _stands(found.low, found.high, measure.better))


def _stands(low: float, high: float, better: int) -> str:
    if not better or low <= 0 <= high:
        return ""
    return "better" if (low > 0) == (better > 0) else "worse"


def number(value: float, measure: Measure) -> str:
    """A value as text; where small values matter, very small ones with two significant digits."""
    scaled = value * measure.scale
    if measure.digits > 2 and 1e-9 < abs(scaled) < 10**-measure.digits / 2:
        text = f"{scaled:.1e}"
    else:
        text = f"{scaled:z,.{measure.digits}f}"
    return text.replace("-", "−") + measure.unit


def worst_first(measured: Iterable[Mapping[str, float]]) -> list[str]:
    """The kinds of reference text among the keys ``drift.KIND.kl``, the largest mean KL first."""
    found: dict[str, list[float]] = {}
    for values in measured:
        for key, value in values.items():
            if key.startswith("drift.") and key.endswith(".kl"):
                found.setdefault(key.removeprefix("drift.").removesuffix(".kl"), []).append(value)
    return sorted(found, key=lambda kind: (-sum(found[kind]) / len(found[kind]), kind))
