"""What a patch will do to another's repairs, foretold from gradients before either is applied with the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmrepair.failures import Tokens
from lmrepair.model import Edit, LowRank, Net, settled
from lmrepair.patch.patch import Patch


@dataclass(frozen=True)
class Forecast:
    """A failure that patch ``owner`` repairs: its least margin with that patch alone, and with ``other`` too.

    ``margin`` is how far the wanted token is ahead of its best rival where it is least so; ``foretold`` the same
    with the other patch added, to first order. Not above 0: the repair is in danger.
    """

    owner: int
    other: int
    failure: str
    margin: float
    foretold: float

    @property
    def danger(self) -> bool:
        return self.foretold <= 0


def forecasts(net: Net, patches: Sequence[Patch]) -> list[Forecast]:
    """For every failure that a patch repairs, and every other patch: what that one will make of its margin.

    One forward pass a failure and one backward pass a target token, with the owner's patch on; the other patches
    enter by their changes alone. The net must be the untouched model; it is left as it was.
    """
    found = []
    for owner, patch in enumerate(patches):
        others = [(at, other) for at, other in enumerate(patches) if at != owner]
        with patch.on(net), settled(net.model):
            for item in patch.items:
                if not item.repaired:
                    continue
                margins, moved = _margins(net, item.tokens, [other.changes for _, other in others])
                for (at, _), change in zip(others, moved, strict=True):
                    least, foretold = float(margins.min()), float((margins + change).min())
                    found.append(Forecast(owner, at, item.tokens.id, least, foretold))
    return found


def _margins(net: Net, tokens: Tokens, others: Sequence[Mapping[int, Edit]]) -> tuple[Tensor, list[Tensor]]:
    """Margins [N] of the wanted tokens, and for each of the others how far it moves them, [N] to first order.

    A change ΔW of a projection that reads z_t and writes y_t moves a margin by Σ_t ⟨∂margin/∂y_t, ΔW z_t⟩.
    """
    (batch,) = net.batches([tokens])
    layers = sorted({layer for changes in others for layer in changes})
    with torch.enable_grad(), net.watch(layers) as watched:
        logits = net.logits(batch).float()
        wanted = logits.gather(1, batch.wanted[:, None]).squeeze(1)
        rival = logits.scatter(1, batch.wanted[:, None], float("-inf")).max(dim=1).values
        margins = wanted - rival
        outputs = [watched.outputs[layer] for layer in layers]
        gradients = [torch.autograd.grad(margin, outputs, retain_graph=True) if outputs else () for margin in margins]
    moved = []
    for changes in others:
        writes = {layer: _written(watched.inputs[layer], change) for layer, change in changes.items()}
        sums = [
            sum(float((gradient[layers.index(layer)].float() * write).sum()) for layer, write in writes.items())
            for gradient in gradients
        ]
        moved.append(torch.tensor(sums))
    return margins.detach().cpu(), moved


def _written(read: Tensor, change: Edit) -> Tensor:
    """ΔW z, shaped as the projection's output."""
    if isinstance(change, LowRank):
        a, b = (part.to(read.device) for part in change.factors(read.shape[-1]))
        return read.detach().float() @ a.T @ b.T
    columns, deltas = change.columns.to(read.device), change.deltas.to(read.device)
    return read.detach()[..., columns].float() @ deltas
