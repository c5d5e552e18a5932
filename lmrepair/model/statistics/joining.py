"""Statistics of two texts, each gathered by itself, as those of both together."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lmrepair.model.statistics.moments import Moment, OnDemand, Statistics


def joined(one: Statistics, other: Statistics, weighted: bool) -> Statistics:
    """As if both texts had been read at once, each position counting as ``weighted`` says.

    Weighted, C is Σ zzᵀ‖δ‖² / Σ‖δ‖² and F is Σ δδᵀ‖z‖² · Σ‖δ‖² / (n Σ‖z‖²‖δ‖²), so that tr F = Σ‖δ‖² / n and
    tr C = Σ‖z‖²‖δ‖² / Σ‖δ‖²: with n, the sums of each text are known from its traces. Sampled rows of both are kept.
    """
    pair = _Pair(one, other, weighted)
    return Statistics(
        OnDemand(one.inputs, pair.inputs, keep=False),
        OnDemand(one.outputs, pair.outputs, keep=False),
        f"{one.name}, {other.name}",
        one.tokens + other.tokens,
    )


@dataclass(frozen=True)
class _Pair:
    """Two texts' statistics. ``traces``: layer → those of both C, which are large to unpack again."""

    one: Statistics
    other: Statistics
    weighted: bool
    traces: dict[int, tuple[float, float]] = field(default_factory=dict)

    def inputs(self, layer: int) -> Moment:
        """C, in which a text counts by its Σ‖δ‖²."""
        both = self.one.inputs[layer], self.other.inputs[layer]
        self.traces[layer] = _trace(both[0]), _trace(both[1])
        return _added(*both, self._shares(layer)[0])

    def outputs(self, layer: int) -> Moment:
        """F, in which it counts by n times its tr C."""
        if layer not in self.traces:
            self.traces[layer] = _trace(self.one.inputs[layer]), _trace(self.other.inputs[layer])
        return _added(self.one.outputs[layer], self.other.outputs[layer], self._shares(layer)[1])

    def _shares(self, layer: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """What the two C count, and the two F."""
        count = self.one.tokens + self.other.tokens
        first, second = self.one.tokens / count, self.other.tokens / count
        wide = self.traces[layer]
        steep = first * _trace(self.one.outputs[layer]), second * _trace(self.other.outputs[layer])
        total, both = sum(steep), steep[0] * wide[0] + steep[1] * wide[1]
        if not self.weighted or not both > 0:
            return (first, second), (first, second)
        scale = total / both
        return (steep[0] / total, steep[1] / total), (first * wide[0] * scale, second * wide[1] * scale)


def _trace(moment: Moment) -> float:
    return float(moment.diagonal.double().sum())


def _added(one: Moment, other: Moment, shares: tuple[float, float]) -> Moment:
    """The sum of two moments of a kind, each times its share."""
    if one.kind != "sampled":
        return Moment(one.kind, (one.values * shares[0]).add_(other.values, alpha=shares[1]), one.widths)
    rows = len(one.values) + len(other.values)
    scaled = [
        part.values * (share * rows / len(part.values)) ** 0.5 for part, share in zip((one, other), shares, strict=True)
    ]
    return Moment("sampled", torch.cat(scaled))
