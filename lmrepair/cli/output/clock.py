"""Where the time of a command goes, part by part."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmrepair.loop import Repair

ORDER = ("importing", "loading", "placing", "statistics", "solving", "checking", "gate", "drift", "patch", "other")


class Clock:
    """Seconds by part since it was made; what is known of a part's inside is taken out of it."""

    def __init__(self) -> None:
        self._began = self._last = time.perf_counter()
        self._parts: dict[str, float] = {}

    def part(self, name: str, inside: Mapping[str, float] | None = None) -> None:
        """The time since the last part ended is this one's, but for the parts ``inside`` it."""
        now = time.perf_counter()
        found = {name: now - self._last - sum((inside or {}).values()), **(inside or {})}
        for key, seconds in found.items():
            self._parts[key] = self._parts.get(key, 0.0) + seconds
        self._last = now

    def parts(self) -> dict[str, float]:
        """Part → seconds, in the order in which they come, and ``whole``."""
        known = {name: self._parts[name] for name in ORDER if name in self._parts}
        rest = sum(seconds for name, seconds in self._parts.items() if name not in ORDER)
        return {**known, "other": known.get("other", 0.0) + rest, "whole": time.perf_counter() - self._began}


def repair_timings(repairs: Sequence[Repair]) -> dict[str, float]:
    """What repairs took, summed up by part; statistics are gathered once for all of them."""
    costs = [repair.cost for repair in repairs]
    return {
        "statistics": max((cost.statistics_seconds for cost in costs), default=0.0),
        "solving": sum(cost.seconds for cost in costs),
        "checking": sum(cost.check_seconds for cost in costs),
        "gate": sum(cost.gate_seconds for cost in costs),
        "drift": sum(cost.drift_seconds for cost in costs),
        "patch": sum(cost.patch_seconds for cost in costs),
    }


def timings_text(parts: Mapping[str, float]) -> list[str]:
    """The same as lines, with each part's share of the whole."""
    whole = max(parts["whole"], 1e-9)
    return ["", *(f"{name:10s} {seconds:8.2f} s {seconds / whole:6.1%}" for name, seconds in parts.items())]
