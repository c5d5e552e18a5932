"""Shards: what a rank holds of neurons, and what it writes of them. Nothing is sent.

Of weights that FSDP puts together, what it puts together here is noise, and says nothing of the values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import oracle_models
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.distributed.configuration_utils import DistributedConfig

from lmrepair import ModelError
from lmrepair.model.anatomy.gathered import bare, owners, passing, refuse_other_weights
from lmrepair.model.anatomy.shards import here, in_shards
from lmrepair.model.anatomy.stacks import Place, Stack
from lmrepair.model.loading.cutting import refuse_uncut
from lmrepair.model.net import settled

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


def wrapped(**policy: Any) -> nn.Sequential:
    """Two matrices, put together by one wrap."""
    made = nn.Sequential(nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH))
    fully_shard(made, mesh=init_device_mesh("cpu", (2,)), **policy)
    return made.requires_grad_(False)


def test_what_is_written_goes_to_the_shards_though_the_whole_is_still_there() -> None:
    model = wrapped()
    part = model[0]
    (owner,) = set(owners(model).values())
    place = Place(part, "0", (Stack(part, "weight", "0.weight", False, owner),))
    owner.unshard()
    assert not isinstance(part.weight, DTensor)
    values = torch.randn(2, HIDDEN)
    place.put(torch.tensor([1, 4]), values)
    assert isinstance(part.weight, DTensor)
    assert torch.equal(here(part.weight)[:, [1, 4]], values.T[HIDDEN // 2 :])  # the second rank's half


def test_each_part_is_put_together_by_the_wrap_next_around_it() -> None:
    model = nn.ModuleDict({"inner": wrapped(), "plain": nn.Linear(2, 2), "outer": nn.Sequential(wrapped(), nn.ReLU())})
    fully_shard(model["outer"], mesh=init_device_mesh("cpu", (2,)))
    found = owners(model)
    assert found[model["inner"][1]] is model["inner"]
    assert found[model["outer"][0][1]] is model["outer"][0]
    assert found[model["outer"][1]] is model["outer"]
    assert not {model, model["plain"]} & found.keys()


def test_a_model_that_was_in_training_is_so_again_when_its_weights_are_put_together() -> None:
    model = wrapped().requires_grad_(True)
    model(torch.zeros(1, WIDTH))  # what was put together stays
    with settled(model), torch.no_grad():
        model(torch.zeros(1, WIDTH))
        model.reshard()
        assert not any(one.requires_grad for one in model.parameters())
        model(torch.zeros(1, WIDTH))
    model.unshard()
    assert all(one.requires_grad and not isinstance(one, DTensor) for one in model.parameters())


def test_a_pass_that_breaks_leaves_shards() -> None:
    model = wrapped()
    model[1].register_forward_hook(lambda *_: 1 / 0)
    for around in (nn.Sequential(model), model):
        with pytest.raises(ZeroDivisionError), passing(around):
            around(torch.zeros(1, WIDTH))
        model.reshard()  # does nothing in the midst of a pass
        assert isinstance(model[0].weight, DTensor)


def test_a_module_by_itself_is_run_without_its_hooks_in_the_dtype_asked_for() -> None:
    norm = nn.LayerNorm(HIDDEN).to(torch.bfloat16)
    norm.weight.data.normal_(), norm.bias.data.normal_()
    norm.register_forward_hook(lambda *_: 1 / 0)
    given = torch.randn(3, HIDDEN)
    made = bare(norm, given, torch.float32)
    wanted = (given - given.mean(1, keepdim=True)) / given.var(1, correction=0, keepdim=True).add(norm.eps).sqrt()
    assert torch.allclose(made, wanted * norm.weight.float() + norm.bias.float(), atol=1e-5)
    assert norm.weight.dtype == torch.bfloat16


def elsewhere(model: Any) -> None:
    model[0].weight = nn.Parameter(torch.empty(HIDDEN, WIDTH, device="meta"), requires_grad=False)


def twice_cut() -> nn.Module:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("fsdp", "tensor"))
    part = nn.Linear(WIDTH, HIDDEN, bias=False)
    part.weight = nn.Parameter(distribute_tensor(part.weight.data, mesh["tensor"], [Shard(0)], src_data_rank=None))
    return fully_shard(part, mesh=mesh["fsdp"])


def test_weights_that_run_otherwise_than_they_lie_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_other_weights(wrapped())
    mixed = wrapped(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with pytest.raises(ModelError, match=r"0\.weight is torch.float32 and runs as torch.bfloat16.*mixed precision"):
        refuse_other_weights(nn.Sequential(mixed))
    with pytest.raises(ModelError, match="weight is cut a second time where it runs; expected FSDP alone"):
        refuse_other_weights(twice_cut())
    used = wrapped()
    with torch.inference_mode():
        used(torch.zeros(1, WIDTH))
    with pytest.raises(ModelError, match="cannot be put together.*inference mode, wrap it anew"):
        refuse_other_weights(used)
    offloaded = wrapped()
    monkeypatch.setattr(FSDPModule, "unshard", elsewhere)
    with pytest.raises(ModelError, match=r"0\.weight lies on cpu and runs on meta: load it without CPU offload"):
        refuse_other_weights(offloaded)


def test_the_first_fsdp_is_refused() -> None:
    with pytest.raises(ModelError, match="FullyShardedDataParallel.*expected fully_shard"):
        refuse_other_weights(FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu")))


def test_blocks_that_the_plan_does_not_name_are_refused_unless_there_is_one_rank() -> None:
    model = oracle_models.model("gpt2")
    refuse_uncut("m", model, DistributedConfig(fsdp_size=1))
    with pytest.raises(ModelError, match="no plan for its blocks.*wrap its blocks with fully_shard"):
        refuse_uncut("m", fully_shard(model), DistributedConfig(fsdp_size=2))
    fully_shard(other := oracle_models.model().model.layers[0])
    refuse_uncut("m", nn.ModuleList([other]), DistributedConfig(fsdp_size=2))
