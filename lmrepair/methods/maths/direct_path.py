"""From an FFN output straight to the margins: everything between its layer and the end taken as the identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmrepair.model import Batch, Net, Preference, Reading, Sites


@dataclass(frozen=True)
class Slopes(Reading):
    """What the model prefers, the coefficients, and ``slopes`` [N, d]: of each margin by the last FFN's output."""

    slopes: Tensor = field(default_factory=lambda: torch.zeros(0, 0))


def read_slopes(net: Net, batches: Sequence[Batch], sites: Sites, focus: Tensor | None, margin: float | None) -> Slopes:
    """One forward pass over each batch, and one backward pass through the final norm and the head.

    A margin is the logit of the wanted token minus its best rival's. Behind
    the last FFN no position sees another, so one backward pass gives each margin its own slope.
    """
    preferences: list[Preference] = []
    coefficients: dict[int, list[Tensor]] = {layer: [] for layer in sites.layers}
    slopes: list[Tensor] = []
    for batch in batches:
        with torch.enable_grad(), net.watch((*sites.layers, net.layers - 1)) as watched:
            logits = net.logits(batch).float()
            preference = Preference.of(logits.detach(), batch.wanted)
            picked = logits.gather(1, torch.stack([batch.wanted, preference.rival], dim=1))
            (slope,) = torch.autograd.grad((picked[:, 0] - picked[:, 1]).sum(), watched.outputs[net.layers - 1])
        preferences.append(preference)
        slopes.append(slope.reshape(-1, net.hidden)[batch.rows].float())
        for layer in sites.layers:
            z = watched.inputs[layer].detach().reshape(-1, net.widths[layer])[batch.rows]
            coefficients[layer].append(z[:, sites.columns[layer].to(z.device)].float())
    joint = Preference.join(preferences)
    if margin is not None and joint.holds(focus, margin):
        return Slopes(joint, True)
    rows = {layer: torch.cat(parts) for layer, parts in coefficients.items()}
    return Slopes(joint, False, rows, slopes=torch.cat(slopes))


def contrasting(net: Net, reading: Slopes, rows: Tensor, layers: int, per_row: int) -> Sites:
    """Where the contrast of wanted and rival is made, along the direct path: layers, and neurons of each position.

    Neuron j brings z_j ⟨w_j, g⟩ to a position's margin, g its slope. The ``layers`` whose neurons together bring most,
    of either sign, over the positions ``rows`` [N] are kept; in these the ``per_row`` neurons that bring most to
    each position (0: all of them).
    """
    slopes = reading.slopes[rows]
    brought = {layer: z[rows] * (slopes @ net.columns(layer).float().T) for layer, z in reading.coefficients.items()}
    order = sorted(brought, key=lambda layer: -float(brought[layer].sum(dim=1).abs().sum()))
    kept = sorted(order[:layers])
    if not per_row:
        return Sites({layer: torch.arange(net.widths[layer]) for layer in kept})
    joined = torch.cat([brought[layer] for layer in kept], dim=1).abs()
    best = joined.topk(min(per_row, joined.shape[1]), dim=1).indices.unique().cpu()
    columns, first = {}, 0
    for layer in kept:
        inside = best[(best >= first) & (best < first + net.widths[layer])] - first
        if len(inside):
            columns[layer] = inside
        first += net.widths[layer]
    return Sites(columns)


def scaled(directions: Tensor, slopes: Tensor, rises: Tensor) -> Tensor:
    """Changes R [N, d] of a state along ``directions``, so long that ⟨slope, change⟩ = rise, in float64.

    Where a direction does not raise its margin, the slope itself takes its place; no slope, no change.
    """
    b, g = directions.double(), slopes.double()
    along = (b * g).sum(dim=1)
    led = along > 1e-3 * b.norm(dim=1) * g.norm(dim=1)
    b = torch.where(led[:, None], b, g)
    along = torch.where(led, along, g.square().sum(dim=1))
    return b * torch.where(along > 0, rises.double() / torch.where(along > 0, along, 1.0), 0.0)[:, None]
