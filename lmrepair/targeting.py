"""How much of a model a method may write to: shares of layers and neurons, and the patterns. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from lmrepair.errors import UsageError

PATTERNS = ("global", "even", "layer")


@dataclass(frozen=True)
class Targeting:
    """How much of the model a method may write to.

    ``layers``: the share of layers whose loss suffers most when their FFN is skipped ("one" or a
    fraction up to 1), or the upper ones, whatever they do: "last", or "upper" and a fraction.
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
        return max(1, math.ceil(share_of(self.layers.removeprefix("upper "), "layers") * layers))


def share_of(text: str, option: str) -> Fraction:
    """A share in (0, 1] from "1/16" or "0.25". Raises UsageError for anything else."""
    try:
        share = Fraction(str(text).strip())
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(f"{option} {text!r} is no share; expected a number above 0 and up to 1, as in 1/16") from error
    if not 0 < share <= 1:
        raise UsageError(f"{option} {text!r} is out of range; expected a number above 0 and up to 1, as in 1/16")
    return share
