"""How much of a model a method may write to: shares of layers and neurons, the patterns, and the choice itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from lmrepair.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from lmrepair.model import Batch, Net, Preference, Sites

PATTERNS = ("global", "even", "layer")


@dataclass(frozen=True)
class Targeting:
    """How much of the model a method may write to.

    ``layers``: the share of layers whose loss suffers most when their FFN is skipped ("one" or a
    fraction up to 1), or the upper ones, whatever they do: "last", or "upper" and a fraction; "auto": left
    to the method, at most all.
    ``share``: the share of neurons, taken by attribution in one of the PATTERNS:
    "global" (over all layers together), "even" (in each layer), "layer" (in the most responsible layer).
    """

    layers: str = "1"
    pattern: str = "even"
    share: str = "1"

    def check(self) -> None:
        """Raise UsageError for a pattern that does not exist, or for what is no share."""
        if self.pattern not in PATTERNS:
            raise UsageError(f"unknown pattern {self.pattern!r}; known: {', '.join(PATTERNS)}")
        share_of(self.share, "share")
        self.layer_count(1)

    @property
    def upper(self) -> bool:
        """Whether layers are taken from the top, not by what skipping them does."""
        return self.layers == "last" or self.layers.startswith("upper ")

    def fixed(self, layers: int) -> bool:
        """Whether the choice is the same for every mistake of a model with that many layers."""
        every = self.upper or self.layer_count(layers) == layers
        return every and share_of(self.share, "share") == 1 and self.pattern != "layer"

    def layer_count(self, layers: int) -> int:
        """How many of a model's layers these are. Raises UsageError for what is no share."""
        if self.layers in ("one", "last"):
            return 1
        if self.layers == "auto":
            return layers
        try:
            return max(1, math.ceil(share_of(self.layers.removeprefix("upper "), "layers") * layers))
        except UsageError as error:
            known = "a number above 0 and up to 1, as in 1/4, the same behind 'upper', or last, one, auto"
            raise UsageError(f"layers {self.layers!r} is no share of the layers; expected {known}") from error


def share_of(text: str, option: str) -> Fraction:
    """A share in (0, 1] from "1/16" or "0.25". Raises UsageError for anything else."""
    try:
        share = Fraction(str(text).strip())
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(f"{option} {text!r} is no share; expected a number above 0 and up to 1, as in 1/16") from error
    if not 0 < share <= 1:
        raise UsageError(f"{option} {text!r} is out of range; expected a number above 0 and up to 1, as in 1/16")
    return share


def locate(net: Net, batches: Sequence[Batch], preference: Preference, targeting: Targeting) -> Sites:
    """Choose the neurons that a method may change for the mistakes of these batches."""
    from lmrepair.diagnosis import attributions, skipped_losses

    known = fixed_sites(net, targeting)
    if known is not None:
        return known
    share = share_of(targeting.share, "share")
    layers = _upper(net, targeting)
    if not targeting.upper and len(layers) < net.layers:
        losses = skipped_losses(net, batches, preference)
        layers = sorted(losses.argsort(descending=True, stable=True)[: len(layers)].tolist())
    if share == 1 and targeting.pattern != "layer":
        return _whole(net, layers)
    return choose(attributions(net, batches, preference, layers), targeting.pattern, share)


def fixed_sites(net: Net, targeting: Targeting) -> Sites | None:
    """What ``locate`` gives where that is the same for all mistakes, else None."""
    targeting.check()
    if not targeting.fixed(net.layers):
        return None
    return _whole(net, _upper(net, targeting))


def _upper(net: Net, targeting: Targeting) -> list[int]:
    return list(range(net.layers))[-targeting.layer_count(net.layers) :]


def _whole(net: Net, layers: Sequence[int]) -> Sites:
    import torch

    from lmrepair.model import Sites

    return Sites({layer: torch.arange(net.widths[layer]) for layer in layers})


def choose(scores: dict[int, Tensor], pattern: str, share: Fraction) -> Sites:
    """The top share of neurons by their scores (layer → [m]), in one of the PATTERNS; at least one."""
    import torch

    from lmrepair.model import Sites

    if pattern == "layer":
        # The most responsible layer is the one that holds the most attribution.
        best = max(scores, key=lambda layer: (float(scores[layer].square().sum()), -layer))
        scores = {best: scores[best]}
    if pattern == "global":
        flat = torch.cat(list(scores.values()))
        top = _top(flat, share)
        columns, first = {}, 0
        for layer, part in scores.items():
            inside = top[(top >= first) & (top < first + len(part))] - first
            if len(inside):
                columns[layer] = inside
            first += len(part)
        return Sites(columns)
    return Sites({layer: _top(part, share) for layer, part in scores.items()})


def _top(scores: Tensor, share: Fraction) -> Tensor:
    count = max(1, math.ceil(share * len(scores)))
    return scores.argsort(descending=True, stable=True)[:count].sort().values.cpu()
