"""Where a change of low rank may go: the directions of a layer's coefficients that a solved change uses most.

A change [k, d] of a layer that closes margins is Δ = C⁻¹ zᵀ M: z [T, k] are the coefficients at the T
positions, M = N F⁻¹ [T, d] the mixed slopes N of the margins, C and F the moments. Its expected cost
½ tr(F Δᵀ C Δ) is half the sum of squares of C^½ Δ F^½, so its singular values say what each direction
of Δ is worth. All of them come from two systems of T rows: no root of C or F is taken.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

TINY = 1e-6  # of the largest eigenvalue of a system: below it, it is rounding


def directions(seen: Tensor, mixed: Tensor, white: Tensor) -> tuple[Tensor, Tensor]:
    """The squares σ² [r] of the singular values of C^½ Δ F^½, the largest first, and mixes [T, r] of positions.

    ``seen`` [T, T] is z C⁻¹ zᵀ, ``mixed`` N [T, d], ``white`` N F⁻¹. The direction of neurons that belongs to
    σ_i is u_i = C⁻¹ zᵀ mixes_i [k]; they are orthonormal under C: uᵀ C u = I.
    """
    near = (seen.double() + seen.double().T) / 2
    far = mixed.double() @ white.double().T
    sizes, frame = torch.linalg.eigh(near)
    kept = sizes > TINY * sizes[-1].clamp(min=0)
    root = sizes[kept].sqrt()
    half = frame[:, kept] * root
    squares, turned = torch.linalg.eigh(half.T @ ((far + far.T) / 2) @ half)
    used = (squares > TINY * squares[-1:].clamp(min=0)).nonzero().squeeze(1).flip(0)
    return squares[used], frame[:, kept] / root @ turned[:, used]


def shared_out(worth: Mapping[int, Tensor], sizes: Mapping[int, int], most: int, room: int) -> dict[int, int]:
    """Layer → how many of its directions to keep: those worth most over all layers, each layer's own first.

    ``worth``: layer → σ² [r], the largest first; ``sizes``: layer → numbers that a direction takes. At most
    ``most`` a layer, and all together at most ``room`` numbers (but one direction always). Layers without any
    are left out.
    """
    ranked = sorted(
        (-float(value), layer) for layer, values in worth.items() for value in values[:most].tolist() if value > 0
    )
    counts: dict[int, int] = {}
    left = room
    for _, layer in ranked:
        if counts and sizes[layer] > left:
            break
        left -= sizes[layer]
        counts[layer] = counts.get(layer, 0) + 1
    return counts
