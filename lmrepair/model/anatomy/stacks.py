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


@dataclass(frozen=True)
class Stack:
    """A parameter that holds neurons: one matrix, or one for each of E experts.

    Stored [d, m] or [E, d, m], or with ``rows`` (a neuron is a row) [m, d] or [E, m, d]. ``name`` is that of
    the parameter in the model.
    """

    module: nn.Module
    attribute: str
    name: str
    rows: bool

    @property
    def stored(self) -> Tensor:
        """The parameter without gradients."""
        found: Tensor = getattr(self.module, self.attribute).detach()
        return found

    @property
    def neurons(self) -> Tensor:
        """[E, m, d] (of one matrix [1, m, d]): a view, so that writing to it writes to the model."""
        stored = self.stored if self.rows else self.stored.transpose(-1, -2)
        return stored if stored.dim() == 3 else stored[None]

    @property
    def kind(self) -> tuple[str, tuple[int, ...]]:
        """What the matrices of a list of experts have in common: their names but for numbers, and their shapes."""
        return re.sub(r"\d+", "*", self.name), tuple(self.stored.shape)

    @cached_property
    def experts(self) -> int:
        return self.neurons.shape[0]

    @cached_property
    def width(self) -> int:
        """m, the neurons of one expert."""
        return self.neurons.shape[1]


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
        found = [
            part.clone() if len(inside) == len(part) else part.index_select(0, inside.to(part.device))
            for part, inside, _ in self._hit(columns)
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def put(self, columns: Tensor, values: Tensor) -> None:
        """Set the neurons ``columns`` (sorted) to values [k, d]."""
        with torch.no_grad():
            for part, inside, some in self._hit(columns):
                mine = values[some].to(part.device)
                if len(inside) == len(part):
                    part.copy_(mine)
                else:
                    part.index_copy_(0, inside.to(part.device), mine)

    def _hit(self, columns: Tensor) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """The experts that hold some of the columns: neurons, which of them, and the columns' places."""
        columns = columns.cpu()
        start = 0
        for first, part in self.parts():
            end = int(torch.searchsorted(columns, first + len(part)))
            if end > start or self.dense:
                yield part, columns[start:end] - first, slice(start, end)
            start = end
