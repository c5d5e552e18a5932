"""Which weights a patch was made for: digests of a model with the patched neurons left out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lmrepair.model.anatomy import weight
from lmrepair.model.net import Net

CHUNK = 1 << 26  # bytes hashed, and copied from a device, at once


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 digests: ``body`` of all weights beside the FFN output projections, ``layers`` of each of those.

    A layer's digest leaves out the neurons that the patch changes, if it holds their original values: these
    stand for them, and the digest is the same before and after the patch. Of a layer that is changed as a whole
    by factors, it is that of the original.
    """

    body: str
    layers: tuple[str, ...]


def fingerprint(net: Net, changed: Mapping[int, Tensor]) -> Fingerprint:
    """The fingerprint of a net without the neurons ``changed`` (layer → indices [k]).

    Of a model that lies on several devices as shards, every rank has to ask for it: it is that of the whole.
    """
    projections = {weight(module).data_ptr() for module in net.anatomy.projections}
    body = {
        name: tensor
        for name, tensor in net.model.state_dict().items()
        if isinstance(tensor, Tensor) and tensor.data_ptr() not in projections
    }
    # Shards are put together one after another, in one order on all ranks; what is whole is hashed side by side.
    shards = {
        name: digest(tensor.full_tensor()) for name, tensor in sorted(body.items()) if isinstance(tensor, DTensor)
    }
    with ThreadPoolExecutor() as pool:
        parts = pool.map(lambda item: f"{item[0]} {shards.get(item[0]) or digest(item[1])}", sorted(body.items()))
        layers = pool.map(lambda layer: digest(_unchanged(net, layer, changed)), range(net.layers))
        return Fingerprint(hashlib.sha256("\n".join(parts).encode()).hexdigest(), tuple(layers))


def _unchanged(net: Net, layer: int, changed: Mapping[int, Tensor]) -> Tensor:
    columns = net.columns(layer)
    if layer not in changed:
        return columns
    kept = torch.ones(len(columns), dtype=torch.bool, device=columns.device)
    kept[changed[layer].to(columns.device)] = False
    return columns[kept]


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and values, whatever device it is on and however it is strided."""
    state = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if tensor.numel() == 0:
        return state.hexdigest()
    rows = tensor.detach().reshape(len(tensor), -1) if tensor.dim() else tensor.detach().reshape(1, 1)
    step = max(1, CHUNK // max(1, rows.shape[1] * tensor.element_size()))
    for part in rows.split(step):
        state.update(part.contiguous().cpu().view(torch.uint8).numpy())
    return state.hexdigest()
