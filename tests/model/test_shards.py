"""Shards: what a rank holds of neurons, and what it writes of them. Nothing is sent."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lmrepair.model.anatomy.shards import here, in_shards
from lmrepair.model.anatomy.stacks import Place, Stack

HIDDEN, WIDTH, EXPERTS = 6, 5, 4


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """The second of two ranks, and nobody else."""
    distributed.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield
    distributed.destroy_process_group()


def place_of(stored: Tensor, rows: bool) -> Place:
    holder = nn.Module()
    holder.weight = nn.Parameter(stored, requires_grad=False)
    return Place(holder, "holder", (Stack(holder, "weight", "holder.weight", rows),))


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(("dims", "cut"), [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
def test_a_rank_writes_what_it_holds_and_nothing_else(rows: bool, dims: int, cut: int) -> None:
    generator = torch.Generator().manual_seed(dims + cut)
    matrix = (WIDTH, HIDDEN) if rows else (HIDDEN, WIDTH)
    full = torch.randn((EXPERTS,) * (dims - 2) + matrix, generator=generator)
    alone = place_of(full.clone(), rows)
    mesh = init_device_mesh("cpu", (2,))
    shared = place_of(distribute_tensor(full.clone(), mesh, [Shard(cut)], src_data_rank=None), rows)
    assert in_shards(shared.module)
    assert not in_shards(alone.module)
    assert (shared.width, shared.widths, shared.dtype) == (alone.width, alone.widths, alone.dtype)
    for chosen in (torch.arange(alone.width), torch.tensor([0, 2, alone.width - 1]), torch.tensor([1])):
        values = torch.randn(len(chosen), HIDDEN, generator=generator)
        alone.put(chosen, values)
        shared.put(chosen, values)
        wanted = alone.stacks[0].stored.chunk(2, dim=cut)[1]  # of five, the first rank has three
        assert torch.equal(here(shared.stacks[0].stored), wanted)
