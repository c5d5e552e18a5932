"""What a mixture really multiplies its neurons by, whatever operations it is made of.

While its module runs, every product of rows with one of its matrices is seen: which rows, by which expert.
What each row adds to the module's output, at which token and times what (the routing weight), is asked of the
graph between the two: the output y is linear in the products o, y_t = Σ_i r_i·o_i, and one backward pass with
other numbers in other columns of y tells for every row i its r_i and its t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lmrepair.model.anatomy.stacks import Place, Stack

DIGITS, BASE = 3, 64  # of a token's number, each in a column of its own: exact in 8 bits
See = Callable[[Callable[[], Tensor], Tensor, bool], Tensor]


@dataclass(frozen=True)
class Product:
    """Rows [n, m] that were multiplied by matrices of a stack, row by row by ``experts`` [n]; ``made`` [n, d]."""

    stack: int
    experts: Tensor
    rows: Tensor
    made: Tensor

    def of(self, stack: int) -> Product:
        return Product(stack, self.experts, self.rows, self.made)


@dataclass(frozen=True)
class Routed:
    """The products of one run: ``tokens`` [n] and ``weights`` [n] of every product's rows, over ``count`` tokens.

    ``linear``: of each product, whether nothing but a factor for each row lies between it and the output.
    """

    place: Place
    products: tuple[Product, ...]
    tokens: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    count: int
    linear: tuple[bool, ...]

    def coefficients(self) -> Tensor:
        """What every neuron was multiplied by at every token, [tokens, neurons], float32 at least."""
        found = []
        for at, stack in enumerate(self.place.stacks):
            kind = torch.promote_types(stack.stored.dtype, torch.float32)
            experts = stack.experts if stack.owner else len(_experts(stack.local))  # as many as run on this rank
            z = torch.zeros(self.count * experts, stack.width, dtype=kind, device=stack.stored.device)
            for product, tokens, weights in zip(self.products, self.tokens, self.weights, strict=True):
                if product.stack == at:
                    rows = product.rows.to(kind) * weights[:, None].to(kind)
                    z.index_add_(0, tokens * experts + product.experts, rows)
            found.append(stack.joined_experts(z.reshape(self.count, experts, -1), 1).reshape(self.count, -1))
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)


class Products(TorchFunctionMode):
    """Sees what is multiplied by the matrices of some stacks, by where in memory they lie.

    ``fed``: whether a product was already part of a graph.
    """

    def __init__(self, stacks: Sequence[Stack]) -> None:
        super().__init__()
        self.found: list[Product] = []
        self.fed = False
        self._stacks = [(stack, stack.local) for stack in stacks]
        self._copies: dict[int, tuple[int, Tensor, Tensor]] = {}  # storage → stack, experts by row, and the copy

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not isinstance(made, Tensor) or not made.is_floating_point():
            return made
        values = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        for value in values:
            known = self._known(value)
            if known is not None:
                others = [other for other in values if other is not value]
                return self._seen(*known, value, others, made)
        return made

    def _known(self, value: Tensor) -> tuple[int, Tensor | None] | None:
        """Which stack a tensor is a part of, and whose matrices it holds [n]; None: those of all experts."""
        if not value.is_floating_point() or value.dim() < 2 or isinstance(value, DTensor):
            return None
        storage = value.untyped_storage().data_ptr()
        if storage in self._copies:
            at, experts, _ = self._copies[storage]
            return at, experts
        for at, (stack, stored) in enumerate(self._stacks):
            offset = value.storage_offset() - stored.storage_offset()
            if stored.untyped_storage().data_ptr() == storage and 0 <= offset < stored.numel() >= value.numel():
                size = stack.width * stored.shape[-1 if stack.rows else -2]
                if value.dim() == 3 and value.numel() == stored.numel():
                    return at, None
                return at, torch.arange(offset // size, offset // size + value.numel() // size, device=value.device)
        return None

    def _seen(self, at: int, experts: Tensor | None, value: Tensor, others: Sequence[Tensor], made: Tensor) -> Tensor:
        if made.untyped_storage().data_ptr() == value.untyped_storage().data_ptr():
            return made
        stack, stored = self._stacks[at]
        width, hidden = stack.width, stored.shape[-1 if stack.rows else -2]
        whole = [other for other in others if not other.is_floating_point()]
        floats = [other for other in others if other.is_floating_point()]
        rows = [other for other in floats if other.numel() * hidden == made.numel() * width]
        if not rows:
            if made.numel() % (width * hidden) == 0 and made.dim() > 1:
                # A copy, of all matrices or of those that an index names.
                every = _experts(stored) if experts is None else experts
                chosen = [one for one in whole if one.dim() == 1 and len(one) * width * hidden == made.numel()]
                named = every[chosen[0].long()] if chosen else every
                self._copies[made.untyped_storage().data_ptr()] = (at, named, made)
            return made
        given = rows[0]
        count = given.numel() // width
        by_row = self._by_row(_experts(stored), experts, whole, count)
        if by_row is None:
            return made
        self.fed = self.fed or made.requires_grad
        kept = made if made.requires_grad else made.detach().requires_grad_()
        self.found.append(Product(at, by_row, given.detach().reshape(count, width), kept))
        return kept.clone()  # what follows may add to it in place

    @staticmethod
    def _by_row(every: Tensor, experts: Tensor | None, whole: Sequence[Tensor], count: int) -> Tensor | None:
        """The expert of every row: groups of rows end where an index says, or all experts have as many."""
        if experts is None:
            ends = [one for one in whole if one.dim() == 1 and len(one) == len(every)]
            if ends:
                device = ends[0].device
                found = torch.searchsorted(ends[0].long(), torch.arange(count, device=device), right=True)
                return found.clamp(max=len(every) - 1)
            experts = every
        return experts.repeat_interleave(count // len(experts)) if count % len(experts) == 0 else None


def _experts(stored: Tensor) -> Tensor:
    """The numbers of the matrices in a parameter, as far as it lies here."""
    return torch.arange(len(stored) if stored.dim() == 3 else 1, device=stored.device)


def routed(place: Place, products: Sequence[Product], output: Tensor, hidden: int) -> Routed:
    """Ask the graph between products and output where every row goes. Rows that go nowhere have the weight 0."""
    with torch.enable_grad():
        made = output.reshape(-1, hidden)
    count = len(made)
    numbers = torch.arange(count, device=made.device)
    seed = torch.zeros_like(made)
    seed[:, 0] = 1
    for digit in range(DIGITS):
        seed[:, 1 + digit] = (numbers // BASE**digit % BASE).to(seed.dtype)
    ends = [one.made for one in products] if made.requires_grad else []
    found = torch.autograd.grad(made, ends, seed, retain_graph=True, allow_unused=True) if ends else ()
    read = [_read(slope, hidden, count) for slope in found if slope is not None]
    kept = [product for product, slope in zip(products, found, strict=False) if slope is not None]
    tokens, weights, linear = zip(*read, strict=True) if read else ((), (), ())
    return Routed(place, tuple(kept), tokens, weights, count, linear)


def _read(slope: Tensor, hidden: int, count: int) -> tuple[Tensor, Tensor, bool]:
    """Tokens [n], weights [n], and whether they are all there is, from the slopes of a product's rows."""
    rows = slope.reshape(-1, hidden).to(torch.promote_types(slope.dtype, torch.float32))
    weight = rows[:, 0]
    digits = (rows[:, 1 : 1 + DIGITS] / torch.where(weight == 0, 1.0, weight)[:, None]).round()
    linear = not bool(rows[:, 1 + DIGITS :].any()) and bool(((digits >= 0) & (digits < BASE)).all())
    tokens = (digits.long() * BASE ** torch.arange(DIGITS, device=digits.device)).sum(dim=1)
    return tokens.clamp(0, count - 1), weight, linear


@contextmanager
def seen(place: Place, see: See, hidden: int) -> Iterator[None]:
    """Have ``see`` look at every run of a layer's FFN: coefficients [tokens, m] when they are asked for, output
    [tokens, d], and whether what is below it is part of a graph. What it returns takes the output's place.
    """

    def ran(_: nn.Module, given: Any, output: Tensor) -> Tensor:
        read = given[0].reshape(-1, given[0].shape[-1])
        made = see(lambda: place.stacks[0].joined(read.detach(), 1), output.reshape(-1, hidden), output.requires_grad)
        return made.reshape(output.shape)

    with ExitStack() as hooks:
        if place.dense:
            hooks.callback(place.module.register_forward_hook(ran).remove)
        else:
            hooks.enter_context(recorded(place, lambda one, made, fed: see(one.coefficients, made, fed), hidden))
        yield


@contextmanager
def recorded(place: Place, see: Callable[[Routed, Tensor, bool], Tensor], hidden: int) -> Iterator[None]:
    """The same for a mixture, by the products that are made while it runs."""
    running: list[tuple[Products, bool]] = []

    def start(_: nn.Module, __: Any) -> None:
        running.append((Products(place.stacks), torch.is_grad_enabled()))
        torch.set_grad_enabled(True)
        running[-1][0].__enter__()  # type: ignore[no-untyped-call]

    def left() -> tuple[Products, bool]:
        mode, graph = running.pop()
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        torch.set_grad_enabled(graph)
        return mode, graph

    def unwind() -> None:
        while running:  # torch calls no hook behind a Ctrl-C
            left()

    def stop(_: nn.Module, __: Any, output: Any) -> Any:
        mode, graph = left()
        made = first(output)
        if made is None or made.shape[-1] != hidden:
            return None
        found = routed(place, mode.found, made, hidden)
        fed = graph and mode.fed
        flat = made.reshape(-1, hidden)
        return replaced(output, see(found, flat if fed else flat.detach(), fed).reshape(made.shape))

    with ExitStack() as hooks:
        hooks.callback(unwind)
        hooks.callback(place.module.register_forward_pre_hook(start).remove)
        hooks.callback(place.module.register_forward_hook(stop, always_call=True).remove)
        yield


@contextmanager
def altered(place: Place, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A layer's FFN puts out ``change`` of its output [tokens, d] for the length of a block."""

    def ran(_: nn.Module, __: Any, output: Any) -> Any:
        made = first(output)
        assert made is not None
        return replaced(output, change(made.reshape(-1, made.shape[-1])).reshape(made.shape))

    handle = place.module.register_forward_hook(ran)
    try:
        yield
    finally:
        handle.remove()


def first(output: Any) -> Tensor | None:
    """The first tensor of what a module returned."""
    if isinstance(output, Tensor):
        return output
    found = [part for part in output if isinstance(part, Tensor)] if isinstance(output, tuple | list) else []
    return found[0] if found else None


def replaced(output: Any, made: Tensor) -> Any:
    """What a module returned with another tensor in place of its first."""
    if isinstance(output, Tensor):
        return made
    at = next(at for at, part in enumerate(output) if isinstance(part, Tensor))
    return type(output)([*output[:at], made, *output[at + 1 :]])
