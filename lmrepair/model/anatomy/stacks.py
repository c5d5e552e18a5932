"""Where the neurons of a layer are stored: one matrix, or the matrices of experts side by side.

A layer's neurons are counted through: those of its first matrix, then those of the next. At a token, a
neuron of an expert that the token was not sent to has the coefficient 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lmrepair.model.anatomy.shards import held, here, joined, still, whole


@dataclass(frozen=True)
class Stack:
    """A parameter that holds neurons: one matrix, or one for each of E experts.

    Stored [d, m] or [E, d, m], or with ``rows`` (a neuron is a row) [m, d] or [E, m, d]. ``name`` is that of
    the parameter in the model; ``owner`` puts its shards together for passes, where these do not run as they are.
    """

    module: nn.Module
    attribute: str
    name: str
    rows: bool
    owner: FSDPModule | None = None

    @property
    def stored(self) -> Tensor:
        """The parameter without gradients; on several ranks, in shards."""
        return still(getattr(self.module, self.attribute))

    @property
    def neurons(self) -> Tensor:
        """[E, m, d] (of one matrix [1, m, d]), to be read: a view; of shards, a copy that all ranks put together."""
        return self._turned(whole(self.stored))

    @property
    def local(self) -> Tensor:
        """What of the parameter lies on this rank; while its block runs, what is run."""
        return here(self.stored)

    @property
    def at(self) -> int | str:
        """Where that begins in memory; of nothing, the parameter's name."""
        return self.local.data_ptr() or self.name

    @property
    def resting(self) -> Tensor:
        """The parameter as it lies between passes: what is written elsewhere is lost with the next one."""
        if self.owner is not None:
            self.owner.reshard()
        return self.stored

    def put(self, expert: int, columns: Tensor, values: Tensor) -> None:
        """Set neurons of one expert to values [k, d]; of shards, each rank sets what it holds."""
        part = self._turned(here(self.resting))
        if self.held is not None:
            experts, neurons, places = self.held
            if expert not in experts:
                return
            expert = int((experts == expert).nonzero())
            mine = torch.isin(columns, neurons)
            columns, values = torch.searchsorted(neurons, columns[mine]), values[mine.to(values.device)]
            values = values[:, places.to(values.device)]
        if len(columns) == part.shape[1]:
            part[expert].copy_(values)
        else:
            part[expert].index_copy_(0, columns.to(part.device), values.to(part.device))

    @cached_property
    def held(self) -> tuple[Tensor, ...] | None:
        """Which experts, neurons and numbers of these a rank holds, where not all are on every rank."""
        stored = self.resting
        if stored.dim() == 3:
            parts = tuple(held(stored, dim) for dim in range(3))
        else:
            parts = (torch.zeros(1, dtype=torch.long), *(held(stored, dim) for dim in range(2)))
        return (parts if self.rows else (parts[0], parts[2], parts[1])) if isinstance(stored, DTensor) else None

    def joined(self, part: Tensor, dim: int) -> Tensor:
        """Values one a neuron along ``dim``, from what each rank has of them."""
        return joined(part, self.stored, dim, -2 if self.rows else -1, self.width)

    def joined_experts(self, part: Tensor, dim: int) -> Tensor:
        """Values one an expert along ``dim``, from what each rank has of them."""
        return joined(part, self.stored, dim, 0, self.experts)

    def _turned(self, stored: Tensor) -> Tensor:
        turned = stored if self.rows else stored.transpose(-1, -2)
        return turned if turned.dim() == 3 else turned[None]

    @property
    def kind(self) -> tuple[str, tuple[int, ...]]:
        """What the matrices of a list of experts have in common: their names but for numbers, and their shapes."""
        return re.sub(r"\d+", "*", self.name), tuple(self.stored.shape)

    @cached_property
    def experts(self) -> int:
        return self.stored.shape[0] if self.stored.dim() == 3 else 1

    @cached_property
    def width(self) -> int:
        """m, the neurons of one expert."""
        return self.stored.shape[-2 if self.rows else -1]


@dataclass(frozen=True)
class Place:
    """One layer's FFN: ``module`` (called ``name``) writes its output, the ``stacks`` hold its neurons.

    A dense layer's module is the matrix itself; a mixture's is the part of the block that holds its experts.
    """

    module: nn.Module
    name: str
    stacks: tuple[Stack, ...]

    @property
    def dense(self) -> bool:
        return self.stacks[0].module is self.module and self.stacks[0].stored.dim() == 2

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """The neurons of each expert, in the order in which they are counted."""
        return tuple(stack.width for stack in self.stacks for _ in range(stack.experts))

    @cached_property
    def width(self) -> int:
        return sum(self.widths)

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """How many experts of which width: stacks, or matrices whose names differ in numbers alone."""
        groups = [list(some) for _, some in groupby(self.stacks, lambda stack: stack.kind)]
        return tuple((sum(stack.experts for stack in some), some[0].width) for some in groups)

    @property
    def dtype(self) -> torch.dtype:
        return self.stacks[0].stored.dtype

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        """Expert by expert: the number of its first neuron, and its neurons [m, d] as a view."""
        first = 0
        for stack in self.stacks:
            for neurons in stack.neurons:
                yield first, neurons
                first += len(neurons)

    def neurons(self) -> Tensor:
        """All neurons [m, d]: a view of the one matrix of a dense layer, a copy of several."""
        found = [part for _, part in self.parts()]
        return found[0] if len(found) == 1 else torch.cat(found)

    def take(self, columns: Tensor) -> Tensor:
        """A copy of the neurons ``columns`` (sorted), [k, d]."""
        found = []
        for at, hits in groupby(self._hit(columns), lambda hit: hit[0]):
            neurons = self.stacks[at].neurons
            for _, expert, inside, _ in hits:
                part = neurons[expert]
                found.append(part.clone() if len(inside) == len(part) else part[inside.to(part.device)])
        return found[0] if len(found) == 1 else torch.cat(found)

    def put(self, columns: Tensor, values: Tensor) -> None:
        """Set the neurons ``columns`` (sorted) to values [k, d]."""
        with torch.no_grad():
            for at, expert, inside, some in self._hit(columns):
                self.stacks[at].put(expert, inside, values[some])

    def _hit(self, columns: Tensor) -> Iterator[tuple[int, int, Tensor, slice]]:
        """The experts that hold some of the columns: their stack, their number in it, which of their neurons, and
        the columns' places."""
        columns = columns.cpu()
        first = start = 0
        for at, stack in enumerate(self.stacks):
            for expert in range(stack.experts):
                end = int(torch.searchsorted(columns, first + stack.width))
                if end > start or self.dense:
                    yield at, expert, columns[start:end] - first, slice(start, end)
                first, start = first + stack.width, end
