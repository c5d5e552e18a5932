"""What is done to one layer: deltas with the originals they are added to, or factors with what they lose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmrepair.model.edit.products import Delta, Product, added, patched
from lmrepair.model.edit.sparse_integers import pack, unpack

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Change:
    """One layer's part: neuron indices [k] (int64, sorted), deltas [k, d] (float32), originals [k, d]."""

    columns: Tensor
    deltas: Tensor
    originals: Tensor

    @property
    def delta(self) -> Delta:
        return self.deltas

    @property
    def dtype(self) -> torch.dtype:
        return self.originals.dtype

    @property
    def width(self) -> int:
        """d, the length of a neuron."""
        return self.deltas.shape[1]

    @property
    def largest(self) -> float:
        return float(self.deltas.abs().max())

    def part(self, some: slice) -> Change | None:
        """The change of the neurons in a slice of the layer alone, counted from its start; None where it has none."""
        inside = (self.columns >= some.start) & (self.columns < some.stop)
        if not bool(inside.any()):
            return None
        return Change(self.columns[inside] - some.start, self.deltas[inside], self.originals[inside])

    def patched(self) -> Tensor:
        """The neurons as the patch leaves them: summed in float32, rounded once to the model's dtype."""
        return patched(self.originals, self.deltas)

    def factors(self, width: int) -> tuple[Tensor, Tensor]:
        """A [k, m] and B [d, k], float32, with the change of the whole projection [d, m] = B A: A picks neurons."""
        picks = torch.zeros(len(self.columns), width).scatter_(1, self.columns[:, None], 1.0)
        return picks, self.deltas.T


@dataclass(frozen=True)
class LowRank:
    """The same for a whole layer of m neurons as a product of low rank, with what it takes to go back.

    ``dtype`` is the model's. The original neurons are those that come out when the product is taken from the
    patched ones again, but for ``residue`` (packed, uint8): by how many floats of the dtype that misses, flat
    over [m, d].
    """

    product: Product
    dtype: torch.dtype
    residue: Tensor

    @staticmethod
    def of(product: Product, original: Tensor, now: Tensor | None = None) -> LowRank:
        """The change of neurons [m, d], which makes them what they are ``now`` (worked out, if not given). Its parts
        are on the CPU."""
        made = LowRank(product.to("cpu"), original.dtype, torch.zeros(0, dtype=torch.uint8))
        changed = patched(original, product) if now is None else now
        back, wanted = (part.contiguous().flatten() for part in (made._back(changed), original))
        whole = BITS[original.element_size()]
        places = (back.view(whole) != wanted.view(whole)).nonzero().squeeze(1)
        missed = _ordered(wanted[places]) - _ordered(back[places])
        packed = pack(places.cpu().numpy(), missed.cpu().numpy())
        return replace(made, residue=torch.frombuffer(bytearray(packed), dtype=torch.uint8))

    def missed(self) -> tuple[Tensor, Tensor]:
        """Flat places [n] where going back misses, and by how many floats. Raises ValueError for a damaged residue."""
        places, values = unpack(self.residue.numpy().tobytes())
        return torch.from_numpy(places), torch.from_numpy(values)

    @property
    def columns(self) -> Tensor:
        return torch.arange(self.product.left.shape[1])

    @property
    def delta(self) -> Delta:
        return self.product

    @property
    def deltas(self) -> Tensor:
        """Δ [m, d] in float32."""
        return self.product.dense().float()

    @property
    def width(self) -> int:
        return self.product.right.shape[1]

    @property
    def largest(self) -> float:
        return float(self.product.dense().abs().max())

    def original(self, now: Tensor) -> Tensor:
        """The neurons [m, d] before the patch, from those with it."""
        places, values = (part.to(now.device) for part in self.missed())
        found = self._back(now).contiguous()
        flat = found.view(-1)
        flat[places] = _from_ordered(_ordered(flat[places]) + values, self.dtype)
        return found

    def parts(self, neurons: int) -> Iterator[tuple[slice, LowRank]]:
        """The same for that many neurons at a time, so that little of the layer is in memory at once."""
        missed = self.missed()
        for start in range(0, self.product.left.shape[1], neurons):
            some = slice(start, start + neurons)
            yield some, self.part(some, missed)

    def part(self, some: slice, missed: tuple[Tensor, Tensor] | None = None) -> LowRank:
        """The same for the neurons in a slice of the layer alone; ``missed``, where it is known already."""
        places, values = missed or self.missed()
        first = some.start * self.width
        inside = (places >= first) & (places < some.stop * self.width)
        packed = pack((places[inside] - first).numpy(), values[inside].numpy())
        product = replace(self.product, left=self.product.left[:, some])
        return LowRank(product, self.dtype, torch.frombuffer(bytearray(packed), dtype=torch.uint8))

    def factors(self, width: int) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """A [r, m] and B [d, r], float32, with the change of the whole projection [d, m] = B A."""
        return self.product.factors()

    def _back(self, now: Tensor) -> Tensor:
        return added(self.product.to(now.device).dense().neg_(), now).float().to(now.dtype)


Edit = Change | LowRank


def _ordered(values: Tensor) -> Tensor:
    """Floats as whole numbers (int64) in their order, one apart from the next; −0 comes before 0."""
    bits = values.contiguous().view(BITS[values.element_size()]).long()
    return torch.where(bits < 0, torch.iinfo(BITS[values.element_size()]).min - 1 - bits, bits)


def _from_ordered(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    whole = BITS[torch.empty(0, dtype=dtype).element_size()]
    bits = torch.where(numbers < 0, torch.iinfo(whole).min - 1 - numbers, numbers)
    return bits.to(whole).view(dtype)
