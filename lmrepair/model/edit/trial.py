"""Writing neurons, for a while or for good: every edit of a weight goes through here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

from torch import Tensor

from lmrepair.model.batches import Sites
from lmrepair.model.edit.changes import BITS, Change, Edit, LowRank
from lmrepair.model.edit.products import Delta, Product, patched, written_out
from lmrepair.model.net import DTYPES, Net
from lmrepair.model.process import uninterrupted


class Trial:
    """Neurons under edit: ``with Trial(net, sites) as trial`` puts their original bits back unless kept.

    Deltas are always the whole change since the start, [k, d] float32 or factors; the weights are set to
    cast(original + delta), so that steps too small for the weights' dtype add up.
    """

    def __init__(self, net: Net, sites: Sites) -> None:
        self.net, self.sites = net, sites
        self.originals = {layer: take(net, layer, columns) for layer, columns in sites.columns.items()}
        self._kept = False

    def __enter__(self) -> Trial:
        return self

    def write(self, deltas: Mapping[int, Delta]) -> None:
        """Set the neurons to original + delta, layer → [k, d]; layers not named keep what they have."""
        for layer, delta in deltas.items():
            put(self.net, layer, self.sites.columns[layer], patched(self.originals[layer], delta))

    def keep(self) -> None:
        """Leave the weights as they are now when the block ends without an error."""
        self._kept = True

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if self._kept and kind is None:
            return
        with uninterrupted():
            for layer, original in self.originals.items():
                put(self.net, layer, self.sites.columns[layer], original)

    def changes(self, deltas: Mapping[int, Delta]) -> dict[int, Edit]:
        """What the deltas really change, layer by layer, on the CPU: of dense ones, the neurons that move."""
        found = {layer: self._change(layer, delta) for layer, delta in sorted(deltas.items())}
        return {layer: change for layer, change in found.items() if change is not None}

    def _change(self, layer: int, delta: Delta) -> Edit | None:
        original, columns = self.originals[layer], self.sites.columns[layer]
        values = patched(original, delta)
        moved = ~_equal_bits(values, original).all(dim=1)
        if not bool(moved.any()):
            return None
        whole = len(columns) == self.net.widths[layer]
        if isinstance(delta, Product) and whole and original.dtype in DTYPES.values():
            return LowRank.of(delta, original, values)
        dense = written_out(delta).to(moved.device)
        parts = (columns.to(moved.device)[moved], dense[moved].float(), original[moved])
        return Change(*(part.detach().cpu().contiguous() for part in parts))


@dataclass(frozen=True)
class Projections:
    """All FFN output projections as they were at some time, layer → [m, d], to be written for a while."""

    values: Mapping[int, Tensor]

    @staticmethod
    def of(net: Net) -> Projections:
        return Projections({layer: net.columns(layer).detach().clone() for layer in range(net.layers)})

    @contextmanager
    def on(self, net: Net) -> Iterator[None]:
        with Trial(net, net.every_site()):
            self.write(net)
            yield

    def write(self, net: Net) -> None:
        sites = net.every_site()
        for layer, values in self.values.items():
            put(net, layer, sites.columns[layer], values)


def take(net: Net, layer: int, columns: Tensor) -> Tensor:
    """A copy of some of a layer's neurons, [k, d]."""
    return net.anatomy.ffns[layer].take(columns).to(net.device)


def put(net: Net, layer: int, columns: Tensor, values: Tensor) -> None:
    net.anatomy.ffns[layer].put(columns, values)


def _equal_bits(one: Tensor, other: Tensor) -> Tensor:
    kind = BITS[one.element_size()]
    return one.contiguous().view(kind) == other.contiguous().to(one.device).view(kind)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same, bit for bit."""
    return one.shape == other.shape and one.dtype == other.dtype and bool(_equal_bits(one, other).all())
