"""Weights that every rank holds a part of, and that are put together only while a part of the model runs (FSDP).

Between passes a weight is its shards, or still the whole that the last pass left. What is written goes to the
shards: the next pass puts them together anew. Head and norm are run by themselves too, without the model around them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from lmrepair.errors import ModelError
from lmrepair.model.anatomy.shards import whole
from lmrepair.model.process import uninterrupted

Owners = Mapping[nn.Module, FSDPModule]


def owners(model: nn.Module) -> dict[nn.Module, FSDPModule]:
    """Part of the model → what puts its weights together; without the parts whose weights are always there."""
    found: dict[nn.Module, FSDPModule] = {}
    for part in model.modules():
        if isinstance(part, FSDPModule):
            # Those inside come later and take what is theirs.
            found |= dict.fromkeys(part.modules(), part)
    return found


def around(model: Any, blocks: Sequence[nn.Module], found: Owners) -> tuple[FSDPModule, ...]:
    """The owners of what lies around a model's blocks, the embeddings aside: norm and head."""
    if not found:
        return ()
    apart = {part for block in blocks for part in block.modules()} | {model.get_input_embeddings()}
    return tuple(dict.fromkeys(owner for part, owner in found.items() if part not in apart))


def together(tensor: Tensor, parts: Sequence[FSDPModule]) -> None:
    """Have the weights of some parts there when a gradient goes back from a tensor inside the model.

    FSDP puts together what lies behind an output of its own parts alone; elsewhere memory that is let go of is read.
    """

    def gather(_: Tensor) -> None:
        for part in parts:
            part.unshard()

    if tensor.requires_grad and parts:
        tensor.register_hook(gather)


def rest(model: nn.Module) -> None:
    """Leave of every weight the shards alone."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@contextmanager
def settled(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients on parameters, both put back as they were afterwards."""
    rest(model)  # what is put together from shards are other parameters than these
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        with uninterrupted():
            rest(model)
            for parameter, needed in wanted:
                parameter.requires_grad_(needed)
            for module, training in modes:
                module.training = training


@contextmanager
def passing(model: nn.Module) -> Iterator[None]:
    """Passes of a model; where an error ends one midway, its weights are shards again afterwards."""
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            for part in _outermost(model):
                part.reset_iter_state()


def _outermost(module: nn.Module) -> Iterator[FSDPModule]:
    if isinstance(module, FSDPModule):
        yield module
    else:
        for child in module.children():
            yield from _outermost(child)


class _Bare(nn.Module):
    """A module without the hooks around it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, given: Tensor) -> Any:
        return self.module.forward(given)


def bare(module: nn.Module, given: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What a module by itself makes of values, from weights that all ranks put together, in another ``dtype`` if asked.

    Its hooks do not run: those of FSDP expect a pass of the whole model, and would wait for its end.
    """
    alone = _Bare(module)
    every = {name: whole(tensor) for name, tensor in (*alone.named_parameters(), *alone.named_buffers())}
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in every.items()}
    made: Tensor = functional_call(alone, cast if dtype else every, (given,))
    return made


def refuse_other_weights(model: nn.Module) -> None:
    """Raise ModelError where what runs is not what lies in the shards; all ranks put every part together once."""
    if any(isinstance(part, FullyShardedDataParallel) for part in model.modules()):
        raise ModelError(
            "the model is wrapped by FullyShardedDataParallel, which keeps no matrices; expected fully_shard (FSDP2), "
            'or lmrepair.load(folder, shards="fsdp")'
        )
    for name, part in model.named_modules():
        if isinstance(part, FSDPModule):
            _refuse_unlike_shards(name, part, model.get_submodule(name))


def _refuse_unlike_shards(name: str, owner: FSDPModule, part: nn.Module) -> None:
    owner.reshard()
    shards = dict(part.named_parameters(remove_duplicate=False))  # tied ones are put together twice
    try:
        owner.unshard()
        for inner, one in part.named_parameters(remove_duplicate=False):
            if one is not shards[inner]:
                _refuse_unlike(f"{name}.{inner}".lstrip("."), shards[inner], one)
    except RuntimeError as error:
        raise ModelError(
            f"{name or 'the model'}: its shards cannot be put together ({' '.join(str(error).split())}); if it "
            "has run in inference mode, wrap it anew and run it under torch.no_grad()"
        ) from error
    finally:
        owner.reshard()


def _refuse_unlike(name: str, shards: Tensor, one: Tensor) -> None:
    if one.device != shards.device:
        reason = f"lies on {shards.device} and runs on {one.device}: load it without CPU offload (fsdp_cpu_offload)"
    elif one.dtype != shards.dtype:
        reason = (
            f"is {shards.dtype} and runs as {one.dtype}, so that no patch would fit what runs: load it without "
            "mixed precision (fsdp_mixed_precision), in the dtype that it is to run in"
        )
    elif isinstance(one, DTensor):
        reason = "is cut a second time where it runs; expected FSDP alone, or tensor parallelism alone"
    else:
        return
    raise ModelError(f"{name} {reason}")
