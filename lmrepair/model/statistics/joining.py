"""Statistics of two texts, each gathered by itself, as those of both together."""

from __future__ import annotations

import torch

from lmrepair.model.moments import Moment, OnDemand, Statistics

Shares = tuple[tuple[float, float], tuple[float, float]]  # what two C count, and two F


def joined(one: Statistics, other: Statistics, weighted: bool) -> Statistics:
    """As if both texts had been read at once, each position counting as ``weighted`` says.

    Weighted, C is Σ zzᵀ‖δ‖² / Σ‖δ‖² and F is Σ δδᵀ‖z‖² · Σ‖δ‖² / (n Σ‖z‖²‖δ‖²), so that tr F = Σ‖δ‖² / n and
    tr C = Σ‖z‖²‖δ‖² / Σ‖δ‖²: with n, the sums of each text are known from its traces. Sampled rows of both are kept.
    """
    counts = one.tokens, other.tokens

    def shares(layer: int) -> Shares:
        parts = [count / sum(counts) for count in counts]
        if not weighted:
            return (parts[0], parts[1]), (parts[0], parts[1])
        wide = [_trace(each.inputs[layer]) for each in (one, other)]
        steep = [part * _trace(each.outputs[layer]) for part, each in zip(parts, (one, other), strict=True)]
        both = sum(a * b for a, b in zip(steep, wide, strict=True))
        if not both > 0:
            return (parts[0], parts[1]), (parts[0], parts[1])
        scale = sum(steep) / both
        inputs = steep[0] / sum(steep), steep[1] / sum(steep)
        return inputs, (parts[0] * wide[0] * scale, parts[1] * wide[1] * scale)

    known = OnDemand(one.inputs, shares)
    return Statistics(
        OnDemand(one.inputs, lambda at: _added(one.inputs[at], other.inputs[at], known[at][0]), keep=False),
        OnDemand(one.outputs, lambda at: _added(one.outputs[at], other.outputs[at], known[at][1]), keep=False),
        f"{one.name}, {other.name}",
        sum(counts),
    )


def _trace(moment: Moment) -> float:
    return float(moment.diagonal.double().sum())


def _added(one: Moment, other: Moment, shares: tuple[float, float]) -> Moment:
    """The sum of two moments of a kind, each times its share."""
    if one.kind != "sampled":
        return Moment(one.kind, shares[0] * one.values + shares[1] * other.values, one.widths)
    rows = len(one.values) + len(other.values)
    scaled = [
        part.values * (share * rows / len(part.values)) ** 0.5 for part, share in zip((one, other), shares, strict=True)
    ]
    return Moment("sampled", torch.cat(scaled))
