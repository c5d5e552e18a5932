"""The experts of a mixture in a checkpoint: as stacks or one by one, told by what they hold, as everything else.

An expert's matrix is a tensor, or a part of a stacked one that lies in one piece; either is written like a dense
layer's. Names matter only in that they hold the layer's number, and of experts stored one by one each its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise, product

import torch
from torch import Tensor

from lmrepair.errors import WrongModelError
from lmrepair.model import Change, Edit, patched as patch_values, same_bits
from lmrepair.patch.disk.placing import Placed
from lmrepair.patch.disk.stored import Checkpoint, Stored, numbered
from lmrepair.patch.patch import Patch


@dataclass(frozen=True)
class Expert:
    """One expert on the disk, and what the patch does to it (None: nothing)."""

    placed: Placed
    change: Edit | None


def place_experts(checkpoint: Checkpoint, patch: Patch, patched: bool) -> dict[int, list[Expert]]:
    """Layer → its experts, for every mixture of the model, changed or not, checked whole.

    Raises WrongModelError for any other model or state. One expert at a time is in memory.
    """
    found = {}
    for layer in patch.fingerprint.experts:
        experts = _in_state(checkpoint, patch, layer, patched)
        if experts is None and layer in patch.changes and _in_state(checkpoint, patch, layer, not patched):
            raise WrongModelError("the patch is not applied" if patched else "the patch is already applied")
        if experts is None:
            raise WrongModelError(
                f"{checkpoint.folder}: no experts of layer {layer} as they were when the patch was made for "
                f"{patch.made.model!r}; is it another model, or was another patch applied since?"
            )
        found[layer] = experts
    return found


def _in_state(checkpoint: Checkpoint, patch: Patch, layer: int, patched: bool) -> list[Expert] | None:
    groups = patch.fingerprint.experts[layer]
    near = [one for one in checkpoint.tensors.values() if layer in numbered(one.name)]
    mine = [one for one in near if one.torch_dtype == patch.dtype]
    options = [list(_options(mine, layer, count, (patch.width, width))) for count, width in groups]
    ends = [0, *accumulate(width for count, width in groups for _ in range(count))]
    changes = [_part(patch.changes.get(layer), slice(*ends)) for ends in pairwise(ends)]
    for chosen in product(*options):
        experts = [Expert(*pair) for pair in zip(chain(*chosen), changes, strict=True)]
        if all(_may_be(one, patched) for one in experts) and _fits(experts, patch, layer, patched):
            return experts
    return None


def _options(stored: Sequence[Stored], layer: int, count: int, shape: tuple[int, int]) -> Iterator[list[Placed]]:
    """Every way in which tensors of a layer can be ``count`` matrices [d, m] or [m, d]."""
    for rows in (False, True):
        wanted = shape[::-1] if rows else shape
        for one in stored:
            if one.shape == (count, *wanted):
                yield [Placed(_slice(one, at), rows) for at in range(count)]
        series: dict[str, dict[int, Stored]] = {}
        for one in stored:
            if one.shape == wanted and count == 1:
                yield [Placed(one, rows)]
            elif one.shape == wanted:
                for name, number in _series(one.name, layer):
                    series.setdefault(name, {})[number] = one
        for some in series.values():
            if sorted(some) == list(range(count)):
                yield [Placed(some[at], rows) for at in range(count)]


def _slice(stack: Stored, at: int) -> Stored:
    size = (stack.end - stack.start) // stack.shape[0]
    start = stack.start + at * size
    return replace(stack, shape=stack.shape[1:], start=start, end=start + size)


def _series(name: str, layer: int) -> Iterator[tuple[str, int]]:
    """The name with a star in place of each of its numbers beside the layer's (the first that equals it)."""
    parts = name.split(".")
    own = parts.index(str(layer))
    for at, part in enumerate(parts):
        if part.isdecimal() and at != own:
            yield ".".join([*parts[:at], "*", *parts[at + 1 :]]), int(part)


def _part(change: Edit | None, some: slice) -> Edit | None:
    return None if change is None else change.part(some)


def _may_be(expert: Expert, patched: bool) -> bool:
    change = expert.change
    if not isinstance(change, Change):
        return True
    return expert.placed.may_hold(change.columns, change.patched() if patched else change.originals)


def _fits(experts: Sequence[Expert], patch: Patch, layer: int, patched: bool) -> bool:
    """Whether all experts together have the layer's digest in the patch's fingerprint, and the changed neurons fit."""
    wanted = patch.fingerprint.layers[layer]
    kept = []
    for expert in experts:
        neurons = _before(expert.change, expert.placed.read(), patched)
        if neurons is None:
            return False
        kept.append((expert, len(neurons)))
    if not wanted:  # a composition that was put together without the model
        return True
    state = hashlib.sha256(f"{patch.dtype} {(sum(count for _, count in kept), patch.width)}".encode())
    for expert, _ in kept:
        neurons = _before(expert.change, expert.placed.read(), patched)
        assert neurons is not None
        state.update(neurons.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest() == wanted


def _before(change: Edit | None, neurons: Tensor, patched: bool) -> Tensor | None:
    """What a fingerprint is of: the neurons that a change of single ones leaves, or all before one of the whole."""
    if change is None:
        return neurons
    if isinstance(change, Change):
        values = change.patched() if patched else change.originals
        if not same_bits(neurons[change.columns].contiguous(), values):
            return None
        kept = torch.ones(len(neurons), dtype=torch.bool)
        kept[change.columns] = False
        return neurons[kept]
    if not patched:
        return neurons
    before = change.original(neurons.contiguous())
    return before if same_bits(patch_values(before, change.delta), neurons.contiguous()) else None


def changed(experts: Mapping[int, Sequence[Expert]]) -> list[tuple[int, Edit, Placed]]:
    """Layer, change and place of every expert that the patch changes."""
    return [
        (layer, one.change, one.placed) for layer, some in experts.items() for one in some if one.change is not None
    ]
