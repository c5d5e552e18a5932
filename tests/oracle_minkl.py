"""Slow float64 versions of what minkl is made of; like oracle.py, nothing here comes from the package.

Moments are dense matrices, gradients of margins come from autograd on the dense weights, the metric is
one Kronecker product, and the constrained problem is solved by trying every set of active constraints.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from oracle import Sequences, _matrices, _neuron_major, _twin
from torch import Tensor

# --- moments --------------------------------------------------------------------------------------


def dense(kind: str, values: Tensor, widths: Sequence[int] = ()) -> Tensor:
    """E[x xᵀ] [w, w] of what a full, a sampled or a diagonal moment holds, or one in blocks of these widths."""
    values = values.double()
    if kind == "blocks":
        first, parts = 0, []
        for width in widths:
            parts.append(values[:width, first : first + width])
            first += width
        return torch.block_diag(*parts)
    if kind == "full":
        return values
    if kind == "diagonal":
        return torch.diag(values)
    total = torch.zeros(values.shape[1], values.shape[1], dtype=torch.float64)
    for row in values:
        total = total + torch.outer(row, row)
    return total / values.shape[0]


def damped(matrix: Tensor, share: float) -> Tensor:
    """The matrix with that share of its mean diagonal added to its diagonal; a zero matrix becomes I."""
    mean = float(torch.trace(matrix)) / len(matrix)
    return matrix + (share * mean if mean > 0 else 1.0) * torch.eye(len(matrix), dtype=torch.float64)


def cost(f: Tensor, delta: Tensor, c: Tensor) -> float:
    """½ tr(F Δ C Δᵀ), Δ [d, m], as a sum over all four indices."""
    return float(torch.einsum("ab,bj,jk,ak->", f, delta, c, delta)) / 2


# --- statistics -----------------------------------------------------------------------------------


def read(model: Any, ids: Sequence[int]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Log-probabilities [T, V] of one text, z [T, m] and y [T, d] of every layer; y are leaves of the graph."""
    twin = _twin(model).requires_grad_(False)
    z: list[Tensor] = []
    y: list[Tensor] = []

    def keep(_: Any, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        z.append(given[0][0].detach())
        nudge = torch.zeros_like(output).requires_grad_(True)
        y.append(nudge)
        return output + nudge

    handles = [matrix.register_forward_hook(keep) for matrix in _matrices(twin)]
    with torch.enable_grad():
        logs = twin(input_ids=torch.tensor([list(ids)])).logits[0].log_softmax(1)
    for handle in handles:
        handle.remove()
    return logs, z, y


def inputs(model: Any, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """For each layer C = E[z zᵀ] over all positions that a token follows, one outer product after another."""
    totals, count = [], 0
    for ids in texts:
        _, z, _ = read(model, ids)
        totals.append([sum(torch.outer(row, row) for row in rows[:-1]) for rows in z])
        count += len(ids) - 1
    return [sum(parts) / count for parts in zip(*totals, strict=True)]  # type: ignore[arg-type]


def slopes(model: Any, ids: Sequence[int]) -> list[Tensor]:
    """For each layer [T−1, V, T−1, d]: gradient of −log p(v) at position t with respect to y at position i."""
    logs, _, y = read(model, ids)
    count, size = len(ids) - 1, logs.shape[1]
    found = [torch.zeros(count, size, count, part.shape[-1], dtype=torch.float64) for part in y]
    for t, v in itertools.product(range(count), range(size)):
        for layer, part in enumerate(torch.autograd.grad(-logs[t, v], y, retain_graph=True)):
            found[layer][t, v] = part[0, :count]
    return found


def fisher(model: Any, ids: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """For each layer F = E[δ δᵀ] of one text, and the variance of every entry of one draw of it, both [d, d].

    The expectation goes over every way to draw a next token at each of the T−1 positions: δ at position i
    is the gradient of the sum of all T−1 losses. One draw is the mean over the positions of δ δᵀ.
    """
    logs, _, _ = read(model, ids)
    chances = logs[:-1].exp().detach()
    count, size = chances.shape
    means, variances = [], []
    for table in slopes(model, ids):
        first = torch.zeros(table.shape[-1], table.shape[-1], dtype=torch.float64)
        second = torch.zeros_like(first)
        for said in itertools.product(range(size), repeat=count):
            chance, delta = 1.0, torch.zeros_like(table[0, 0])
            for t, v in enumerate(said):
                chance *= float(chances[t, v])
                delta = delta + table[t, v]
            draw = delta.T @ delta / count
            first += chance * draw
            second += chance * draw**2
        means.append(first)
        variances.append(second - first**2)
    return means, variances


# --- margins and the step -------------------------------------------------------------------------


def margins(model: Any, sequences: Sequences, all_rivals: bool = False) -> tuple[Tensor, list[list[Tensor]]]:
    """Margins [N] of all target tokens, and for each of them the gradients, layer → [m, d]: dense autograd.

    ``all_rivals``: gradients of the log-odds of the wanted token instead.
    """
    twin = _twin(model)
    weights = [matrix.weight for matrix in _matrices(twin)]
    values, made = [], []
    for prompt, target in sequences:
        out = twin(input_ids=torch.tensor([[*prompt, *target]])).logits[0]
        for at, wanted in enumerate(target):
            row = out[len(prompt) - 1 + at]
            others = torch.cat([row[:wanted], row[wanted + 1 :]])
            margin = row[wanted] - others.max()
            values.append(margin.detach())
            chance = row.softmax(0)[wanted]
            value = chance.log() - (1 - chance).log() if all_rivals else margin
            parts = torch.autograd.grad(value, weights, retain_graph=True)
            made.append([_neuron_major(m, part) for m, part in zip(_matrices(twin), parts, strict=True)])
    return torch.stack(values), made


def system(gradients: Sequence[Sequence[Tensor]], c: Sequence[Tensor], f: Sequence[Tensor]) -> Tensor:
    """K_st = Σ_l ⟨J_sl, C⁻¹ J_tl F⁻¹⟩ for J [m, d], with C and F damped already."""
    found = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for s, one in enumerate(gradients):
        for t, other in enumerate(gradients):
            for layer in range(len(c)):
                found[s, t] += (one[layer] * (torch.linalg.inv(c[layer]) @ other[layer] @ f[layer].inverse())).sum()
    return found


def spans(deltas: Sequence[Tensor], c: Sequence[Tensor], f: Sequence[Tensor], rank: int) -> list[Tensor]:
    """Layer → the directions U [m, r] of Δ [m, d] worth most: C^½ U are left singular vectors of C^½ Δ F^½."""
    found = []
    for delta, inside, outside in zip(deltas, c, f, strict=True):
        sizes, frame = torch.linalg.eigh(inside)
        root, back = (frame * sizes**power @ frame.T for power in (0.5, -0.5))
        wide, turn = torch.linalg.eigh(outside)
        left, values, _ = torch.linalg.svd(root @ delta @ (turn * wide**0.5 @ turn.T))
        kept = min(rank, int((values > 1e-3 * values[0]).sum()))
        found.append(back @ left[:, :kept])
    return found


def least(matrix: Tensor, wanted: Tensor) -> Tensor:
    """λ ≥ 0 of least λᵀAλ/2 − λᵀb, by trying every set of entries that may be above zero."""
    count = len(wanted)
    best, value = torch.zeros(count, dtype=torch.float64), 0.0
    for chosen in itertools.product([False, True], repeat=count):
        where = torch.tensor(chosen)
        if not any(chosen):
            continue
        trial = torch.zeros(count, dtype=torch.float64)
        trial[where] = torch.linalg.pinv(matrix[where][:, where], hermitian=True) @ wanted[where]
        now = float(trial @ matrix @ trial / 2 - trial @ wanted)
        if bool((trial >= 0).all()) and now < value:
            best, value = trial, now
    return best


def step(
    gradients: Sequence[Sequence[Tensor]],
    rise: Tensor,
    c: Sequence[Tensor],
    f: Sequence[Tensor],
    ridge: float,
) -> list[Tensor]:
    """Layer → Δ [m, d] = Σ_s λ_s C⁻¹ J_s F⁻¹ of least cost that lifts every margin by ``rise``, J [m, d].

    ``ridge`` is added to the diagonal of K, as a share of its mean.
    """
    k = system(gradients, c, f)
    k = k + ridge * torch.trace(k) / len(k) * torch.eye(len(k), dtype=torch.float64)
    weights = least(k, rise)
    return [
        sum(  # type: ignore[misc]
            weight * (torch.linalg.inv(c[layer]) @ one[layer] @ torch.linalg.inv(f[layer]))
            for weight, one in zip(weights, gradients, strict=True)
        )
        for layer in range(len(c))
    ]
