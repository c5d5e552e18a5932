"""Rank layers and neurons by how much they have to do with the mistakes, and choose where to write."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lmrepair.model import Batch, Net, Preference


def skipped_losses(net: Net, batches: Sequence[Batch], preference: Preference) -> Tensor:
    """The loss [layers] (nats, mean over failures) at each failure's first mistake with that layer's FFN skipped."""
    rows = first_mistakes(batches, preference)
    losses = torch.zeros(net.layers, dtype=torch.float64)
    with torch.inference_mode():
        for layer in range(net.layers):
            for batch, chosen in zip(batches, rows, strict=True):
                if len(chosen):
                    losses[layer] += _skipped_loss(net, layer, batch, chosen)
    return losses / max(1, sum(len(chosen) for chosen in rows))


def _skipped_loss(net: Net, layer: int, batch: Batch, chosen: Tensor) -> float:
    with net.altered(layer, torch.zeros_like):
        logits = net.logits(batch, batch.rows[chosen])
    return float(F.cross_entropy(logits.double(), batch.wanted[chosen], reduction="sum"))


def first_mistakes(batches: Sequence[Batch], preference: Preference) -> list[Tensor]:
    """For each batch, the indices (into its N rows) of each failure's first mistake."""
    found, at = [], 0
    for batch in batches:
        wrong = (~(preference.gap[at : at + len(batch.rows)] < 0)).nonzero().squeeze(1).tolist()
        owners = batch.owner.tolist()
        first: dict[int, int] = {}
        for row in wrong:
            first.setdefault(owners[row], row)
        found.append(torch.tensor(sorted(first.values()), dtype=torch.long, device=batch.rows.device))
        at += len(batch.rows)
    return found


def attributions(
    net: Net, batches: Sequence[Batch], preference: Preference, layers: Sequence[int], by: str = "probability"
) -> dict[int, Tensor]:
    """Gradient × activation of every neuron of the layers, layer → [m].

    The score of a neuron is the L2 norm, over the positions of the mistakes, of z·∂f/∂z at the input of
    the output projection, where f sums over the mistakes the probability of the wanted token, or (``by``
    "contrast") its logit minus the rival's.
    """
    squares = {layer: torch.zeros(net.widths[layer], dtype=torch.float64, device=net.device) for layer in layers}
    at = 0
    for batch in batches:
        part = slice(at, at + len(batch.rows))
        at += len(batch.rows)
        wrong = ~(preference.gap[part] < 0)
        if not bool(wrong.any()):
            continue
        rows, wanted, rival = batch.rows[wrong], batch.wanted[wrong], preference.rival[part][wrong]
        with torch.enable_grad(), net.watch(layers) as watched:
            logits = net.logits(batch, rows).float()
            if by == "contrast":
                value = (logits.gather(1, wanted[:, None]) - logits.gather(1, rival[:, None])).sum()
            else:
                value = logits.softmax(dim=1).gather(1, wanted[:, None]).sum()
            made = torch.autograd.grad(value, [watched.outputs[layer] for layer in layers])
        for layer, gradient in zip(layers, made, strict=True):
            z = watched.inputs[layer].detach().reshape(-1, net.widths[layer])[rows].double()
            # ∂f/∂z = W ∂f/∂y: the output projection is linear.
            slope = gradient.reshape(-1, net.hidden)[rows].double() @ net.columns(layer).T.double()
            squares[layer] += (z * slope).square().sum(dim=0)
    return {layer: square.sqrt() for layer, square in squares.items()}
