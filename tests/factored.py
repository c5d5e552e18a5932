"""A patch of neurons turned into one of whole layers as factors, for a net without it."""

from __future__ import annotations

from dataclasses import replace

import torch

from lmrepair import Net, Patch
from lmrepair.model import LowRank, Product, fingerprint


def factored(net: Net, patch: Patch, rank: int = 6) -> Patch:
    """The nearest patch whose layers are products of ``rank``; what it repairs is not looked at."""
    changes = {}
    for layer, change in patch.changes.items():
        dense = torch.zeros(net.widths[layer], net.hidden, dtype=torch.float64)
        dense[change.columns] = change.deltas.double()
        left, values, right = torch.linalg.svd(dense, full_matrices=False)
        product = Product.of(left[:, :rank].T, values[:rank, None] * right[:rank])
        changes[layer] = LowRank.of(product, net.columns(layer))
    return replace(patch, changes=changes, fingerprint=fingerprint(net, {}))
