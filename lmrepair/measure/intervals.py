"""How sure a mean over failures is: bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmrepair.errors import UsageError

RESAMPLES_AT_ONCE = 1 << 20  # numbers drawn at once


@dataclass(frozen=True)
class Interval:
    """A mean over ``count`` values with the bounds of its bootstrap interval."""

    mean: float
    low: float
    high: float
    count: int


def bootstrap(values: Sequence[float], seed: int = 0, resamples: int = 2000, level: float = 0.95) -> Interval:
    """Percentile bootstrap of a mean over failures: the middle ``level`` of the means of resampled values.

    With few or equal values the interval is too narrow (one value gives a point); ``count`` says how many
    there were. Raises UsageError for no values, values that are no finite numbers, or a level outside (0, 1).
    """
    import numpy as np

    given = np.asarray(values, dtype=np.float64)
    if given.ndim != 1 or not len(given) or not np.isfinite(given).all():
        raise UsageError(f"{given.size} values, not all finite numbers in one row; expected one or more, one a failure")
    if not 0 < level < 1 or resamples < 1:
        raise UsageError(
            f"level {level}, {resamples} resamples; expected a level between 0 and 1, one resample or more"
        )
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, RESAMPLES_AT_ONCE // len(given))
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        means[start : start + rows] = given[generator.integers(0, len(given), (rows, len(given)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(given.mean()), float(low), float(high), len(given))


def paired(
    values: Sequence[float], others: Sequence[float], seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> Interval:
    """The bootstrap of the differences ``values`` − ``others``, one pair a failure, in the same order."""
    if len(values) != len(others):
        raise UsageError(f"{len(values)} values and {len(others)} others; expected the same failures in both")
    differences = [value - other for value, other in zip(values, others, strict=True)]
    return bootstrap(differences, seed, resamples, level)
