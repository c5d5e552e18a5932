"""A change beside the weights: the model answers as if it were written, and nothing is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor

from lmrepair.model.anatomy import seen
from lmrepair.model.edit.changes import Edit, LowRank
from lmrepair.model.net import Net


@contextmanager
def beside(net: Net, changes: Mapping[int, Edit]) -> Iterator[None]:
    """Add Δᵀ z to what the layers' FFNs put out, for the length of a block (not in inference mode).

    The same as the change written into the weights, but for their rounding.
    """

    def ran(change: Edit, read: Callable[[], Tensor], output: Tensor, _: bool) -> Tensor:
        return output + _put_out(read(), change).to(output)

    with ExitStack() as hooks:
        for layer, change in changes.items():
            hooks.enter_context(seen(net.anatomy.ffns[layer], partial(ran, change), net.hidden))
        yield


def _put_out(read: Tensor, change: Edit) -> Tensor:
    """Δᵀ z [tokens, d] of coefficients z [tokens, m], in float32."""
    if isinstance(change, LowRank):
        a, b = (part.to(read.device) for part in change.factors(read.shape[1]))
        return read.float() @ a.T @ b.T
    columns, deltas = change.columns.to(read.device), change.deltas.to(read.device)
    return read[:, columns].float() @ deltas
