"""Fingerprints: what they leave out, what they notice, and that a known one is only brought up to date."""

from __future__ import annotations

import hashlib

import oracle_models
import pytest
import torch

from lmrepair.model import Net, fingerprint


def sha(tensor: torch.Tensor) -> str:
    head = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    return hashlib.sha256(head + tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def without(net: Net, layer: int, left_out: list[int]) -> torch.Tensor:
    """The neurons [m, d] of a layer, in the order of its columns, without some."""
    kept = [row for row in range(net.widths[layer]) if row not in left_out]
    return net.columns(layer)[kept]


@pytest.mark.parametrize("kind", oracle_models.KINDS)
def test_layers_are_digests_of_the_neurons_that_stay(kind: str) -> None:
    net = oracle_models.net(kind)
    changed = {0: [1, 2, 5], 2: list(range(net.widths[2]))}
    found = fingerprint(net, {layer: torch.tensor(rows) for layer, rows in changed.items()})
    wanted = [sha(without(net, layer, changed.get(layer, []))) for layer in range(net.layers)]
    assert list(found.layers) == wanted


@pytest.mark.parametrize("kind", oracle_models.KINDS)
def test_a_known_fingerprint_is_brought_up_to_date(kind: str) -> None:
    """As if all had been read; what is not left out is not read."""
    net = oracle_models.net(kind)
    known = fingerprint(net, {})
    for changed in ({}, {1: torch.tensor([0, 3])}, {at: torch.arange(4) for at in range(net.layers)}):
        assert fingerprint(net, changed, known) == fingerprint(net, changed)
    with torch.no_grad():
        net.columns(0)[0] += 1.0
    assert fingerprint(net, {}).layers[0] != known.layers[0]
    assert fingerprint(net, {1: torch.tensor([2])}, known).layers[0] == known.layers[0]


def test_every_weight_counts_once() -> None:
    net = oracle_models.net()
    known = fingerprint(net, {})
    projections = {place.stacks[0].at for place in net.anatomy.ffns}
    for name, tensor in net.model.state_dict().items():
        before = tensor.clone()
        with torch.no_grad():
            tensor.view(-1)[0] += 0.5
        moved = fingerprint(net, {})
        inside = sum(one != other for one, other in zip(moved.layers, known.layers, strict=True))
        of_layer = bool({name, tensor.data_ptr()} & projections)
        assert (moved.body != known.body, inside) == ((False, 1) if of_layer else (True, 0)), name
        with torch.no_grad():
            tensor.copy_(before)
    assert fingerprint(net, {}) == known
