"""From an FFN output straight to the margins: everything between its layer and the end taken as the identity.

Where a norm lies between an FFN and the stream, that norm is part of the path: a change of the output y of length r
adds γ/r times it to the stream (the length held).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lmrepair.model import Batch, Net, Norm, Preference, Reading, Sites

SLIGHT = 0.3  # of a norm's median gain; Gemma's go from a hundredth to a hundred of it


@dataclass(frozen=True)
class Slopes(Reading):
    """What the model prefers, the coefficients, and ``slopes`` [N, d]: of each margin by what the last FFN adds to the
    stream.

    ``units``: layer → γ/r̄ [d], what a unit of its output adds to the stream where a norm lies between them, r̄ the
    root mean square of the lengths r; the layer's coefficients are times r̄/r.
    """

    slopes: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    units: Mapping[int, Tensor] = field(default_factory=dict)


def read_slopes(net: Net, batches: Sequence[Batch], sites: Sites, focus: Tensor | None, margin: float | None) -> Slopes:
    """One forward pass over each batch, and one backward pass through the final norm and the head.

    A margin is the logit of the wanted token minus its best rival's. Behind
    the last FFN no position sees another, so one backward pass gives each margin its own slope.
    """
    preferences: list[Preference] = []
    coefficients: dict[int, list[Tensor]] = {layer: [] for layer in sites.layers}
    norms = {layer: norm for layer in sites.layers if (norm := net.anatomy.behind[layer]) is not None}
    lengths: dict[int, list[Tensor]] = {layer: [] for layer in norms}
    slopes: list[Tensor] = []
    for batch in batches:
        with torch.enable_grad(), net.watch((*sites.layers, net.layers - 1)) as watched, _joining(net) as added:
            logits = net.logits(batch).float()
            preference = Preference.of(logits.detach(), batch.wanted)
            picked = logits.gather(1, torch.stack([batch.wanted, preference.rival], dim=1))
            by = added[0] if added else watched.outputs[net.layers - 1]
            (slope,) = torch.autograd.grad((picked[:, 0] - picked[:, 1]).sum(), by)
        preferences.append(preference)
        slopes.append(slope.to(net.device).reshape(-1, net.hidden)[batch.rows].float())
        for layer in sites.layers:
            z = watched.inputs[layer].detach().reshape(-1, net.widths[layer])[batch.rows]
            coefficients[layer].append(z[:, sites.columns[layer].to(z.device)].float())
        for layer, found in lengths.items():
            outputs = watched.outputs[layer].detach().reshape(-1, net.hidden)[batch.rows]
            found.append(lengths_behind(net, norms[layer], outputs))
    joint = Preference.join(preferences)
    if margin is not None and joint.holds(focus, margin):
        return Slopes(joint, True)
    rows = {layer: torch.cat(parts) for layer, parts in coefficients.items()}
    units = {}
    for layer, parts in lengths.items():
        rows[layer], units[layer] = in_stream(norms[layer], rows[layer], torch.cat(parts))
    return Slopes(joint, False, rows, slopes=torch.cat(slopes), units=units)


@contextmanager
def _joining(net: Net) -> Iterator[list[Tensor]]:
    """What the last layer's norm behind its FFN hands to the stream in a forward pass; nothing where it has none."""
    kept: list[Tensor] = []
    norm = net.anatomy.behind[-1]
    if norm is None:
        yield kept
        return

    def keep(_: nn.Module, __: object, made: Tensor) -> None:
        kept.append(made)

    handle = norm.module.register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


def lengths_behind(net: Net, norm: Norm, outputs: Tensor) -> Tensor:
    """By what the norm behind an FFN divides its outputs [N, d], [N]: γ⊙y = r · norm(y)."""
    there = next(norm.module.parameters(), outputs).device
    with torch.no_grad():
        made = net.alone(norm.module, outputs[None].to(there))[0].float().to(net.device)
    scaled = norm.gain.to(net.device) * outputs.float()
    return (scaled * made).sum(dim=1).abs() / made.square().sum(dim=1).clamp(min=torch.finfo(torch.float32).tiny)


def in_stream(norm: Norm, keys: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Keys z·r̄/r [N, k] from coefficients and lengths r [N], and γ/r̄ [d]: with them a change Δ [k, d] of a layer
    behind a norm adds (keys Δ)⊙γ/r̄ to the stream."""
    usual = lengths.square().mean().sqrt()
    return keys * (usual / lengths)[:, None], norm.gain.to(lengths.device) / usual


def undone(unit: Tensor) -> Tensor:
    """1/u [d]; towards 0 where |u| is so small that an output would have to move far to be felt."""
    return unit / (unit.square() + (SLIGHT * unit.abs().median()).square())


def contrasting(net: Net, reading: Slopes, rows: Tensor, layers: int, per_row: int) -> Sites:
    """Where the contrast of wanted and rival is made, along the direct path: layers, and neurons of each position.

    Neuron j brings z_j ⟨w_j, g⟩ to a position's margin, g its slope. The ``layers`` whose neurons together bring most,
    of either sign, over the positions ``rows`` [N] are kept; in these the ``per_row`` neurons that bring most to
    each position (0: all of them).
    """
    slopes = reading.slopes[rows]
    units = reading.units
    brought = {
        layer: z[rows] * ((slopes * units[layer] if layer in units else slopes) @ net.columns(layer).float().T)
        for layer, z in reading.coefficients.items()
    }
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
