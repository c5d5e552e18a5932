"""Which weights a patch was made for: digests of a model with the patched neurons left out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lmrepair.model.anatomy import here, whole
from lmrepair.model.net import Net

CHUNK = 1 << 26  # bytes hashed, and copied from a device, at once; of a model with fewer, no part is worth a thread


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 digests: ``body`` of all weights beside the FFN output projections, ``layers`` of each of those.

    A layer's digest leaves out the neurons that the patch changes, if it holds their original values: these
    stand for them, and the digest is the same before and after the patch. Of a layer that is changed as a whole
    by factors, it is that of the original. ``experts``: of layers that are mixtures, how many
    experts of which width there are, in the order in which their neurons are counted.
    """

    body: str
    layers: tuple[str, ...]
    experts: Mapping[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)


def fingerprint(net: Net, changed: Mapping[int, Tensor], known: Fingerprint | None = None) -> Fingerprint:
    """The fingerprint of a net without the neurons ``changed`` (layer → indices [k]).

    ``known``: that of the same net as it is, without any left out; then only the changed layers are read.
    Of a model in shards, every rank has to ask for it: it is that of the whole.
    """
    if known is not None:
        digests = [
            layer_digest(net, layer, changed[layer]) if layer in changed else found
            for layer, found in enumerate(known.layers)
        ]
        return replace(known, layers=tuple(digests))
    every = net.model.state_dict()  # before it is asked where neurons lie: shards put together may be let go of here
    projections = {stack.at for place in net.anatomy.ffns for stack in place.stacks}
    body = {
        name: tensor
        for name, tensor in every.items()
        if isinstance(tensor, Tensor) and not {name, here(tensor).data_ptr()} & projections
    }
    with ThreadPoolExecutor() as pool:
        each: Any = map if net.bytes < CHUNK or net.in_shards else pool.map  # ranks put shards together in one order
        parts = list(each(lambda item: f"{item[0]} {digest(whole(item[1]))}", sorted(body.items())))
        layers = each(lambda layer: layer_digest(net, layer, changed.get(layer)), range(net.layers))
        experts = {at: place.groups for at, place in enumerate(net.anatomy.ffns) if not place.dense}
        return Fingerprint(hashlib.sha256("\n".join(parts).encode()).hexdigest(), tuple(layers), experts)


def layer_digest(net: Net, layer: int, changed: Tensor | None = None) -> str:
    """The digest of a layer's neurons [m, d] without those that are ``changed`` (indices [k])."""
    place = net.anatomy.ffns[layer]
    kept = torch.ones(place.width, dtype=torch.bool)
    if changed is not None:
        kept[changed.cpu()] = False
    state = _started(place.dtype, (int(kept.sum()), net.hidden))
    for first, neurons in place.parts():
        mine = kept[first : first + len(neurons)]
        _add(state, neurons if bool(mine.all()) else neurons[mine.to(neurons.device)])
    return str(state.hexdigest())


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and values, whatever device it is on and however it is strided."""
    state = _started(tensor.dtype, tuple(tensor.shape))
    _add(state, tensor.detach().reshape(len(tensor), -1) if tensor.dim() else tensor.detach().reshape(1, 1))
    return str(state.hexdigest())


def _started(dtype: torch.dtype, shape: tuple[int, ...]) -> Any:
    return hashlib.sha256(f"{dtype} {shape}".encode())


def _add(state: Any, rows: Tensor) -> None:
    if rows.numel() == 0:
        return
    for part in rows.split(max(1, CHUNK // (rows.shape[1] * rows.element_size()))):
        state.update(part.contiguous().cpu().view(torch.uint8).numpy())
