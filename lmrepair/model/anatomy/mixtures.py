"""Mixtures of experts among the parts of a block: found by what they hold, told by what they do.

A part of a block is a mixture where it holds matrices in stacks, or matrices that do not see every token, and
puts out a sum over these of coefficient × column. The outermost such part counts: it has the shared experts too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.pytorch_utils import Conv1D

from lmrepair.errors import ModelError
from lmrepair.model.anatomy.gathered import Owners
from lmrepair.model.anatomy.products import Product, Routed, recorded
from lmrepair.model.anatomy.stacks import Place, Stack


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is a matrix that a repair could write to."""
    return isinstance(module, nn.Linear | Conv1D)


def suspects(block: nn.Module, whole: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    """Dotted name inside the block → what holds stacks, or matrices that are not ``whole``; outermost first."""
    found: dict[str, nn.Module] = {}
    for path, module in block.named_modules():
        stacked = any(one.dim() == 3 and min(one.shape) > 1 for one in module.parameters(recurse=False))
        if stacked or (is_matrix(module) and not whole(module)):
            names = path.split(".")
            for end in range(1, len(names) + (1 if stacked else 0)):
                name = ".".join(names[:end])
                found[name] = block.get_submodule(name)
    return dict(sorted(found.items(), key=lambda item: item[0].count(".")))


def mixtures(
    blocks: Mapping[str, nn.Module],
    whole: Callable[[nn.Module], bool],
    run: Callable[[], object],
    hidden: Mapping[nn.Module, int],
    tokens: int,
    owners: Owners,
) -> dict[nn.Module, Routed]:
    """The mixtures of the blocks (by their names in the model), each with what one run over ``tokens`` made of it."""
    places: dict[str, Place] = {}
    seen: dict[str, list[Routed]] = {}
    with ExitStack() as hooks:
        for where, block in blocks.items():
            for name, module in suspects(block, whole).items():
                path = f"{where}.{name}"
                places[path] = Place(module, path, tuple(_stacks(path, module, hidden[block], owners)))
                _refuse_apart(places[path], owners.get(block))

                def keep(routed: Routed, made: Tensor, _: bool, path: str = path) -> Tensor:
                    seen.setdefault(path, []).append(routed)
                    return made

                if places[path].stacks:
                    hooks.enter_context(recorded(places[path], keep, hidden[block]))
        if places:
            run()
    found: dict[str, Routed] = {}
    for path in places:
        runs = seen.get(path, [])
        inside = any(path.startswith(f"{outer}.") for outer in found)
        told = _told(runs[0]) if len(runs) == 1 and runs[0].count == tokens and not inside else None
        if told is not None:
            found[path] = told
    return {routed.place.module: routed for routed in found.values()}


def _refuse_apart(place: Place, owner: FSDPModule | None) -> None:
    """Experts are asked for their weights' part in the output while their block runs: FSDP would end its pass there."""
    for stack in place.stacks:
        if stack.owner is not owner:
            raise ModelError(
                f"{stack.name} is put together apart from its block (fully_shard); expected experts that are part of "
                "their block's shards: wrap the block alone"
            )


def _stacks(path: str, module: nn.Module, hidden: int, owners: Owners) -> Iterator[Stack]:
    """Every parameter of a part that could hold neurons of width ``hidden``."""
    for inner, part in module.named_modules():
        for attribute, one in part.named_parameters(recurse=False):
            name = ".".join(filter(None, (path, inner, attribute)))
            if one.dim() == 3 and min(one.shape) > 1 and hidden in one.shape[1:]:
                yield Stack(part, attribute, name, one.shape[1] != hidden, owners.get(part))
            elif attribute == "weight" and is_matrix(part) and one.shape[isinstance(part, Conv1D)] == hidden:
                yield Stack(part, attribute, name, isinstance(part, Conv1D), owners.get(part))


def _told(routed: Routed) -> Routed | None:
    """The same with the stacks that the output is a sum of alone; None for what is no mixture."""
    linear: dict[int, bool] = {}
    for product, one in zip(routed.products, routed.linear, strict=True):
        linear[product.stack] = linear.get(product.stack, True) and one
    stacks = routed.place.stacks
    kinds = {stacks[at].kind for at, one in linear.items() if one}
    kept = [at for at, stack in enumerate(stacks) if linear.get(at, stack.kind in kinds)]
    if sum(stacks[at].experts for at in kept) < 2:
        return None
    turned = {at: _turned(at, routed) for at in kept}
    place = Place(routed.place.module, routed.place.name, tuple(turned.values()))
    parts = zip(routed.products, routed.tokens, routed.weights, routed.linear, strict=True)
    mine = [(product.of(kept.index(product.stack)), *rest) for product, *rest in parts if product.stack in kept]
    products, tokens, weights, flags = zip(*mine, strict=True)
    return Routed(place, products, tokens, weights, routed.count, flags)


def _turned(at: int, routed: Routed) -> Stack:
    """A stack of square matrices the way round in which they are multiplied."""
    stack = routed.place.stacks[at]
    mine = [product for product in routed.products if product.stack == at]
    if not mine or stack.stored.shape[-1] != stack.stored.shape[-2] or isinstance(stack.module, nn.Linear):
        return stack
    other = replace(stack, rows=not stack.rows)
    return min((stack, other), key=lambda one: _missed(one, mine))


def _missed(stack: Stack, products: Sequence[Product]) -> float:
    total = 0.0
    for product in products:
        told = torch.einsum("nm,nmd->nd", product.rows.float(), stack.neurons[product.experts].float())
        made = product.made.detach().reshape(told.shape).float()
        total += float((told - made).square().sum())
    return total
