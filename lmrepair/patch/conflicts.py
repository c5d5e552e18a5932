"""What a patch will do to another's repairs, foretold from gradients before either is applied with the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmrepair.failures import Tokens
from lmrepair.model import Edit, LowRank, Net, Preference, settled
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

    One forward and one backward pass a failure, with the owner's patch on, and one through both of them for each of
    the other patches, which enter by their changes alone. The net must be the untouched model; it is left as it was.
    """
    found = []
    for owner, patch in enumerate(patches):
        others = [(at, other) for at, other in enumerate(patches) if at != owner]
        with patch.on(net), settled(net.model):
            for item in patch.items:
                if not item.repaired:
                    continue
                least, moved = _margins(net, item.tokens, [other.changes for _, other in others])
                for (at, _), foretold in zip(others, moved, strict=True):
                    found.append(Forecast(owner, at, item.tokens.id, least, foretold))
    return found


def _margins(net: Net, tokens: Tokens, others: Sequence[Mapping[int, Edit]]) -> tuple[float, list[float]]:
    """The least margin of the wanted tokens, and what each of the others makes of it.

    A change ΔW of a projection that reads z_t and writes y_t moves the logits, all of them, by Σ_t ∂logits/∂y_t ΔW z_t
    to first order: another token than the present rival may be the one that overtakes. A backward pass is linear in
    the seed it starts from, so its own gradient by the seed is that product.
    """
    (batch,) = net.batches([tokens])
    layers = sorted({layer for changes in others for layer in changes})
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), net.watch(layers) as watched:
        logits = net.logits(batch).float()
        seed = torch.zeros_like(logits, requires_grad=True)
        outputs = [watched.outputs[layer] for layer in layers]
        slopes = dict(zip(layers, torch.autograd.grad(logits, outputs, seed, create_graph=True), strict=True))
        moved = []
        for changes in others:
            pulls = [
                (slopes[layer].float() * _written(watched.inputs[layer], changes[layer])).sum() for layer in changes
            ]
            (shift,) = torch.autograd.grad(torch.stack(pulls).sum(), seed, retain_graph=True)
            moved.append(Preference.of(logits.detach() + shift, batch.wanted))
    least, *foretold = (-float(one.gap.max()) for one in (Preference.of(logits.detach(), batch.wanted), *moved))
    return least, foretold


def _written(read: Tensor, change: Edit) -> Tensor:
    """ΔW z, shaped as the projection's output."""
    if isinstance(change, LowRank):
        a, b = (part.to(read.device) for part in change.factors(read.shape[-1]))
        return read.detach().float() @ a.T @ b.T
    columns, deltas = change.columns.to(read.device), change.deltas.to(read.device)
    return read.detach()[..., columns].float() @ deltas
