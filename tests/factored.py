"""For tests of patches: made up ones, without a repair, or as factors of whole layers; and digests of folders."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lmrepair import Failure, Net, Patch
from lmrepair.model import Change, LowRank, Product, fingerprint
from lmrepair.patch import Item, Made


def made_up(net: Net, failures: Sequence[Failure], seed: int = 0, share: int = 4) -> Patch:
    """A patch of random changes to one neuron in ``share`` of every layer, which says that it repairs the failures."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for layer, width in enumerate(net.widths):
        columns = torch.randperm(width, generator=generator)[: width // share].sort().values
        deltas = 0.1 * torch.randn(len(columns), net.hidden, generator=generator)
        changes[layer] = Change(columns, deltas, net.columns(layer)[columns].clone())
    found = zip(net.tokenize(failures), failures, strict=True)
    items = tuple(Item(tokens, one.prompt or "", one.target, True, (), ()) for tokens, one in found)
    prints = fingerprint(net, {layer: change.columns for layer, change in changes.items()})
    return Patch(changes, items, Made(net.name, "made up", {}, {}, {}), prints)


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


def answering(net: Net, patch: Patch) -> Patch:
    """The patch with, as targets, what the net writes with it; it repairs those that the net alone does not write."""
    tokens = [item.tokens for item in patch.items]
    alone = net.generate(tokens)
    with patch.on(net):
        texts = net.generate(tokens)
    found = zip(patch.items, alone, texts, strict=True)
    items = [
        replace(item, tokens=replace(item.tokens, target=text), repaired=text != before) for item, before, text in found
    ]
    return replace(patch, items=tuple(item for item in items if item.tokens.target))


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of all files below a folder, hidden ones too, by name and in its order."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
