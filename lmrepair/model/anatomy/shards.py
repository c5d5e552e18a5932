"""Tensors that lie on several ranks as shards: put together, told apart, read by row.

Every rank runs the same code on the same numbers, so all of them ask for the same tensors in the same order;
what is put together is a call that all take part in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as distributed
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor


def in_shards(model: nn.Module) -> bool:
    """Whether some of a model's weights lie on several ranks."""
    return any(isinstance(parameter.data, DTensor) for parameter in model.parameters())


def here(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this rank: a view."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def still(parameter: Tensor) -> Tensor:
    """A parameter without gradients. Shards, which inference mode does not let go of their gradients, as they are."""
    return parameter if isinstance(parameter, DTensor) else parameter.detach()


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself; a copy that all ranks put together where it lies in shards."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor


def held(stored: Tensor, dim: int) -> Tensor:
    """Which of the indices along a dimension this rank holds, in order."""
    every = torch.arange(stored.shape[dim])
    if not isinstance(stored, DTensor):
        return every
    # Numbers put where the values are: torch says which part each rank has.
    places = [Shard(0) if isinstance(one, Shard) and one.dim == dim else Replicate() for one in stored.placements]
    mesh = stored.device_mesh
    return distribute_tensor(every.to(mesh.device_type), mesh, places, src_data_rank=None).to_local().cpu()


def joined(part: Tensor, like: Tensor, dim: int, along: int, size: int) -> Tensor:
    """Values from their shards: dimension ``dim``, ``size`` long in all, is cut as ``along`` of a weight ``like``."""
    if part.shape[dim] == size or not isinstance(like, DTensor):
        return part
    shape = [*part.shape]
    shape[dim] = size
    places: Sequence[Placement] = [
        Shard(dim) if isinstance(one, Shard) and one.dim % like.dim() == along % like.dim() else Replicate()
        for one in like.placements
    ]
    stride = torch.empty(shape, device="meta").stride()
    made = DTensor.from_local(
        part.contiguous(), like.device_mesh, places, run_check=False, shape=torch.Size(shape), stride=stride
    )
    return made.full_tensor()


def rows(stored: Tensor, at: Tensor) -> Tensor:
    """Rows [n, d] of a matrix; of one in shards only these are put together."""
    if not isinstance(stored, DTensor):
        return stored[at]
    replicated: Sequence[Placement] = [Replicate()] * stored.device_mesh.ndim
    places = DTensor.from_local(at, stored.device_mesh, replicated, run_check=False)
    return whole(F.embedding(places, stored))


def agreed(value: object) -> bool:
    """Whether all ranks have the same value, and it is not None."""
    values: list[object] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return value is not None and all(one == value for one in values)
