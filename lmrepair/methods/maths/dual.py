"""The system of a minimum-KL step: one row for each open margin, solved for weights that are not negative.

Under the metric ½ Σ tr(F Δ C Δᵀ) the least change that raises margins by b is Δ = Σ_s λ_s C⁻¹ J_s F⁻¹ with
K λ = b and K_st = ⟨J_s, C⁻¹ J_t F⁻¹⟩. The gradients J stay factors (``margins.py``), K is all that is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lmrepair.methods.maths.margins import Factors

RIDGE = 1e-3  # of the mean diagonal of the system
LEAST = 1e-12  # taken for that mean where no neuron that may change has any effect
TRIES = 3  # exchanges of whole sets of constraints that need not leave fewer wrong
MOST = 100  # exchanges, and three for each constraint


Whiten = Callable[[int, Tensor], Tensor]  # layer and slopes g [..., d] → g F⁻¹


def kernel(left: Factors, right: Sequence[Factors], whiten: Whiten) -> Tensor:
    """K [s, r] of a failure's positions with those of others, whose inputs are z C⁻¹ already, in float64:

    K_st = Σ_layers Σ_ij (g_si F⁻¹ g_tj) (z_i C⁻¹ z_j). That is how far one unit of weight on position t moves the
    margin of position s. The slopes are carried over to the others' positions, whitened layer by layer.
    """
    total: Tensor | None = None
    for layer, raw in left.slopes.items():
        count, length, width = raw.shape
        near = left.inputs[layer] @ torch.cat([other.inputs[layer] for other in right]).T
        carried = near.T @ whiten(layer, raw).transpose(0, 1).reshape(length, count * width)
        blocks, at = [], 0
        for other in right:
            here = carried[at : at + len(other.inputs[layer])].view(-1, count, width)
            blocks.append(here.transpose(0, 1).flatten(1) @ other.slopes[layer].flatten(1).T)
            at += len(here)
        part = torch.cat(blocks, dim=1).double()
        total = part if total is None else total + part
    assert total is not None
    return total


def system_of(kept: Sequence[Factors], raw: Sequence[Factors], near: Sequence[Factors], whiten: Whiten) -> Tensor:
    """The kernel's rows [n, k + n] of n positions: with k that are kept from before, and, exactly symmetric, with
    themselves, each pair of failures met once. ``near``: the same as ``raw``, with z C⁻¹ for inputs, as ``kept``.
    """
    ends = torch.tensor([0] + [len(item.rows) for item in raw]).cumsum(0).tolist()
    old = sum(len(item.rows) for item in kept)
    found = torch.zeros(ends[-1], old + ends[-1], dtype=torch.float64, device=raw[0].rows.device)
    for index, item in enumerate(raw):
        rows = kernel(item, [*kept, *near[index:]], whiten)
        here = found[ends[index] : ends[index + 1]]
        here[:, :old], here[:, old + ends[index] :] = rows[:, :old], rows[:, old:]
    own = found[:, old:]
    upper = own.triu(1)
    found[:, old:] = upper + upper.T + own.diagonal().diag()
    return found


def not_negative(system: Tensor, wanted: Tensor) -> Tensor:
    """The weights λ ≥ 0 [N] of least λᵀAλ/2 − λᵀb: constraints that hold by themselves get none.

    Block principal pivoting: whole sets of constraints change sides while fewer and fewer are wrong (or
    for a few TRIES), else the last wrong one alone, which cannot cycle for a positive definite A (Júdice
    and Pires 1994; Kim and Park, 10.1137/110821172).
    """
    count = len(wanted)
    active = wanted > 0
    slack = 1e-10 * wanted.abs().max().clamp(min=1e-300)
    fewest, tries = count + 1, TRIES
    weights = wanted
    for _ in range(MOST + 3 * count):
        weights = torch.zeros_like(wanted)
        chosen = active.nonzero().squeeze(1)
        if len(chosen):
            factor = torch.linalg.cholesky(system[chosen][:, chosen])
            weights[chosen] = torch.cholesky_solve(wanted[chosen, None], factor).squeeze(1)
        wrong = (active & (weights < 0)) | (~active & (wanted - system @ weights > slack))
        number = int(wrong.sum())
        if not number:
            return weights
        fewest, tries = (number, TRIES) if number < fewest else (fewest, tries - 1)
        if tries < 0:
            wrong = torch.arange(count, device=wrong.device) == wrong.nonzero()[-1]
        active = active ^ wrong
    return weights.clamp(min=0)  # rounding alone keeps it from ending


def weights_for(system: Tensor, rise: Tensor) -> Tensor:
    """The weights [n] (float32) that raise margins by ``rise`` [n] through their ``system``, with a ridge added."""
    ridge = RIDGE * system.diagonal().mean().clamp(min=LEAST) * torch.eye(len(system)).to(system)
    return not_negative(system + ridge, rise).float()
