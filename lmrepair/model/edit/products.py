"""Changes of low rank as products of whole numbers, and a change added to neurons: the same on every machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 32767  # of a factor's whole numbers
SPREAD = 16  # between the exponents of one layer's pairs: with it and AT_ONCE every sum below is exact in float64
AT_ONCE = 64  # pairs of factors summed by one product
PART = 1 << 17  # numbers that are taken to float64 at once: few enough to stay in a processor's cache
EXPONENT = 100  # largest size of an exponent


@dataclass(frozen=True)
class Product:
    """A change [k, d] of a layer's neurons, Δ = Σ_i 2^exponents_i · left_i ⊗ right_i, to be summed exactly.

    ``left`` [r, k] and ``right`` [r, d] are int16, ``exponents`` [r] int16, no two further apart than SPREAD.
    """

    left: Tensor
    right: Tensor
    exponents: Tensor

    @staticmethod
    def of(left: Tensor, right: Tensor) -> Product:
        """The product of factors [r, k] and [r, d], each row rounded to a grid of 16 bits.

        Pairs that are too small beside the largest have a coarser one; what rounds to nothing is left out.
        """
        first, steps = _rounded(left, torch.full((len(left),), -EXPONENT))
        _, own = _rounded(right, torch.full((len(right),), -EXPONENT))
        highest = int((steps + own).max()) if len(left) else 0
        second, own = _rounded(right, highest - SPREAD - steps)
        kept = (first != 0).any(dim=1) & (second != 0).any(dim=1)
        return Product(first[kept], second[kept], (steps + own)[kept].to(torch.int16))

    @staticmethod
    def fine(left: Tensor, right: Tensor) -> Product:
        """The same with twice the bits for the left factors: each of them is the sum of two."""
        whole, steps = _rounded(left, torch.full((len(left),), -EXPONENT))
        most = torch.ldexp(whole.double(), steps[:, None])
        return Product.of(torch.cat([most, left.double() - most]), torch.cat([right, right]))

    @property
    def rank(self) -> int:
        return len(self.exponents)

    def dense(self) -> Tensor:
        """Δ [k, d] in float64.

        The products of whole numbers and their sums over AT_ONCE pairs have at most 53 bits, so they are exact
        in whatever order a machine takes them; more pairs than that are added up group by group.
        """
        scales = torch.ldexp(torch.ones(self.rank, dtype=torch.float64, device=self.left.device), self.exponents)
        groups = zip((self.left * scales[:, None]).split(AT_ONCE), self.right.double().split(AT_ONCE), strict=True)
        left, right = next(groups)
        total: Tensor = (right.T @ left).add_(0.0)  # no −0, whatever a machine makes of nothing
        for left, right in groups:
            total += right.T @ left  # the group by itself first, which is exact
        return total.T  # as a projection stores its neurons: most are [d, m]

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r, k] and B [d, r], float32, with Δᵀ = B A exactly."""
        halves = self.exponents // 2
        left = torch.ldexp(self.left.float(), halves[:, None])
        return left, torch.ldexp(self.right.float(), (self.exponents - halves)[:, None]).T

    def times(self, scale: float) -> Product:
        """The same factors, the right ones times ``scale`` and rounded anew."""
        left, right = self.factors()
        return Product.of(left, right.T.double() * scale)

    def plus(self, other: Product) -> Product:
        """The sum, of the rank of both."""
        ours, theirs = self.factors(), other.factors()
        return Product.of(torch.cat([ours[0], theirs[0]]), torch.cat([ours[1], theirs[1]], dim=1).T)

    def to(self, device: torch.device | str) -> Product:
        return Product(*(part.to(device) for part in (self.left, self.right, self.exponents)))


Delta = Tensor | Product  # of k neurons: [k, d] float32, or factors


def no_change(neurons: int, hidden: int, device: torch.device) -> Tensor:
    """A change [k, d] that leaves every number as it is, −0 included, which adding 0 would turn into 0."""
    return torch.full((1, 1), -0.0, device=device).expand(neurons, hidden)


def _rounded(rows: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [r, n] as int16 [r, n] times 2^exponent [r]: the smallest exponents that hold them, at ``least`` those."""
    tops = rows.detach().double().abs().amax(dim=1).cpu()
    fitting = torch.frexp(tops / LARGEST).exponent.clamp(min=-EXPONENT)
    fitting = fitting - (tops <= torch.ldexp(torch.full_like(tops, LARGEST), fitting - 1)).int()
    exponents = torch.maximum(fitting, least.to(fitting))
    scaled = torch.ldexp(rows.detach().double(), -exponents.to(rows.device)[:, None])
    return scaled.round().to(torch.int16), exponents.to(rows.device)


def written_out(delta: Delta) -> Tensor:
    """A change as deltas [k, d] in float32."""
    return delta.dense().float() if isinstance(delta, Product) else delta


def grown(delta: Delta, more: Delta) -> Delta:
    """A change [k, d] with another one added: factors if both are, as long as they are fewer numbers than the sum."""
    if isinstance(more, Product) and (isinstance(delta, Product) or not bool(delta.any())):
        both = delta.plus(more) if isinstance(delta, Product) else more
        neurons, width = both.left.shape[1], both.right.shape[1]
        return both if both.rank * (neurons + width) < neurons * width else written_out(both)
    return written_out(delta) + written_out(more)


def patched(values: Tensor, delta: Delta) -> Tensor:
    """Neurons [k, d] with a change added, in their dtype.

    Deltas are summed with them in float32, products in float64 and rounded to float32; either is then
    rounded to the dtype. A change that lies elsewhere, as those of patches do, comes to the neurons.
    """
    delta = delta.to(values.device)
    if isinstance(delta, Product):
        return added(delta.dense(), values).float().to(values.dtype)
    return (values.float() + delta).to(values.dtype)


def added(total: Tensor, values: Tensor) -> Tensor:
    """A change [k, d] in float64 with neurons of any dtype added, in place: torch takes two dtypes number by number,
    three times as slowly."""
    rows = max(1, PART // len(total)) if len(total) else 1
    for place, part in zip(total.T.split(rows), values.T.split(rows), strict=True):
        place.add_(part.double())
    return total
