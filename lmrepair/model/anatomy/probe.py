"""A short text run through a model: once as it is, then with every block on its own and something changed in each.

In a changed run every block hands its output of the first run to the next, so that what is changed in a
block shows in that block alone: one run asks the same question of all blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lmrepair.errors import ModelError
from lmrepair.model.anatomy.gathered import owners
from lmrepair.model.anatomy.mixtures import is_matrix, mixtures
from lmrepair.model.anatomy.shards import still

LENGTH, POSITION = 8, 3  # of the probe, and where it is nudged
NUDGE = 4.0  # in units of the root mean square of what is nudged
NEGLIGIBLE = 1e-3  # share of the largest change below which a position counts as unchanged

Change = Callable[[Tensor], Tensor]
Runs = Mapping[nn.Module, Sequence["Seen"]]


@dataclass(frozen=True)
class Seen:
    """What a module was given first and what it returned first, in one call."""

    given: Tensor
    made: Tensor


def weight(module: nn.Module) -> Tensor:
    """A module's weight, as stored, without gradients."""
    found: Any = module.weight
    return still(found)


class Probe:
    """One short text, and what the watched parts of a model saw of it: module → its calls, in order.

    ``parts``: block → by dotted name inside it, its mixtures of experts and its matrices outside these, in the
    order in which the block holds them. ``routed``: mixture → what it made of the text.
    """

    def __init__(
        self, model: nn.Module, head: nn.Module, blocks: Mapping[str, nn.Module], norms: Sequence[nn.Module]
    ) -> None:
        """Run it. Raises ModelError for a model that does not take plain token ids or returns no logits."""
        self.model, self.head, self.owners = model, head, owners(model)
        device = weight(head).device
        vocabulary = min(len(weight(head)), _embedded(model))
        self.ids = ((torch.arange(LENGTH) * 7 + 5) % vocabulary)[None].to(device)
        self.norms: list[tuple[nn.Module, Seen]] = []  # in the order in which they ran
        self.clean: dict[nn.Module, list[Seen]] = {}
        parts = [part for block in blocks.values() for part in block.modules() if is_matrix(part)]
        with ExitStack() as hooks:
            for norm in norms:
                hooks.enter_context(_hooked(norm, lambda norm, seen: self.norms.append((norm, seen))))
            self.logits = self._keep([*parts, head, *blocks.values()])
        ran = {name: block for name, block in blocks.items() if block in self.clean}
        widths = {block: self.clean[block][0].made.shape[-1] for block in ran.values()}
        self.routed = mixtures(ran, self._whole, lambda: self.forward(self.ids), widths, LENGTH, self.owners)
        if self.routed:
            self._keep(list(self.routed))
        self.parts = {block: self._parts(block) for block in blocks.values()}

    def _keep(self, parts: Sequence[nn.Module]) -> Tensor:
        """Run the text, and keep what some parts see of it; its logits."""
        with ExitStack() as hooks:
            for part in dict.fromkeys(parts):
                hooks.enter_context(_hooked(part, lambda part, seen: self.clean.setdefault(part, []).append(seen)))
            return self.forward(self.ids)

    def _whole(self, part: nn.Module) -> bool:
        """Whether a part saw every token, once."""
        return len(self.clean.get(part, ())) == 1 and by_position(self.clean[part][0].given) is not None

    def _known(self, part: nn.Module) -> bool:
        """Whether what a part puts out again can be handed on as it is: a matrix that is here whole."""
        return part not in self.routed and not isinstance(part.weight, DTensor)

    def _parts(self, block: nn.Module) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {}
        inside: tuple[str, ...] = ()
        for name, part in block.named_modules():
            if name.startswith(inside) and inside:
                continue
            if part in self.routed:
                inside = (*inside, f"{name}.")
            if part in self.clean and (part in self.routed or is_matrix(part)):
                found[name] = part
        return found

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [1, T, V] of token ids [1, T]."""
        try:
            output = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
            raise ModelError(f"the model does not run on plain token ids ({error}); expected a causal LM") from error
        if not isinstance(getattr(output, "logits", None), Tensor):
            raise ModelError("the model returns no logits; expected a causal language model")
        logits: Tensor = output.logits
        return logits

    def rerun(
        self,
        blocks: Sequence[nn.Module],
        changes: Mapping[nn.Module, Change],
        *,
        held: bool,
        stream: Change | None = None,
    ) -> Runs:
        """The calls of the blocks and their parts, each block on its own, with some parts' outputs changed.

        ``held``: every part puts out what it did in the first run, so that a change reaches only what
        reads it directly; a matrix whose output is known is not multiplied with. ``stream`` changes what the blocks
        are given. The head, of which nobody asks anything here and which may be most of the model, puts out nothing.
        """
        found: dict[nn.Module, list[Seen]] = {}
        parts = dict.fromkeys(part for block in blocks for part in self.parts[block].values())

        def again(part: nn.Module) -> Tensor:
            before = self.clean[part]
            return before[min(len(found.get(part, ())), len(before) - 1)].made

        def inner(part: nn.Module, seen: Seen) -> Tensor | None:
            before = again(part)
            found.setdefault(part, []).append(seen)
            made = (before if held and before.shape == seen.made.shape else seen.made).clone()
            return changes[part](made) if part in changes else made

        def isolate(block: nn.Module, seen: Seen) -> Tensor:
            before = again(block)
            found.setdefault(block, []).append(seen)
            return before.clone()

        with ExitStack() as hooks:
            for part in parts:
                hooks.enter_context(_hooked(part, inner))
                if held and self._known(part):
                    hooks.enter_context(_instead(part, lambda *_, part=part, **__: again(part)))
            for block in dict.fromkeys(blocks):
                hooks.enter_context(_hooked(block, isolate))
                if stream is not None:
                    hooks.enter_context(_fed(block, stream))
            hooks.enter_context(_instead(self.head, lambda given, *_, **__: given[..., :1]))
            self.forward(self.ids)
        return found


def by_position(tensor: Tensor) -> Tensor | None:
    """[LENGTH, width] of what a module saw, or None where it did not see every position once."""
    if tensor.dim() == 0 or tensor.numel() == 0 or tensor.numel() // tensor.shape[-1] != LENGTH:
        return None
    return tensor.reshape(LENGTH, -1).float()


def changed(now: Tensor, before: Tensor) -> list[int] | None:
    """The positions at which a tensor differs from what it was, or None where it has no positions."""
    new, old = by_position(now), by_position(before)
    if new is None or old is None or new.shape != old.shape:
        return None
    change = (new - old).abs().amax(dim=1)
    largest = float(change.max())
    return [at for at in range(LENGTH) if change[at] > NEGLIGIBLE * largest] if largest > 0 else []


def nudge(tensor: Tensor, phase: float = 0.0) -> Tensor:
    """The tensor with its values at POSITION moved, by a pattern that is the same in every run."""
    flat = tensor.reshape(-1, tensor.shape[-1]).clone()
    moved = pattern(flat, phase) * flat.float().pow(2).mean().sqrt().clamp(min=1e-3)
    flat[POSITION] += (NUDGE * moved).to(flat.dtype)
    return flat.reshape(tensor.shape)


def pattern(tensor: Tensor, phase: float = 0.0) -> Tensor:
    """Values in [−1, 1] along a tensor's last dimension, float32."""
    return torch.cos(torch.arange(tensor.shape[-1], device=tensor.device) * 1.7 + 0.3 + phase)


def first_infinite(model: nn.Module, run: Callable[[], object]) -> str:
    """The name of the first part whose output is not finite while ``run`` runs the model; empty if none is."""
    found: list[str] = []
    with ExitStack() as hooks:
        for name, part in model.named_modules():

            def look(_: nn.Module, seen: Seen, name: str = name) -> None:
                if not found and seen.made.is_floating_point() and not bool(seen.made.isfinite().all()):
                    found.append(name)

            if not any(True for _ in part.children()):
                hooks.enter_context(_hooked(part, look))
        run()
    return found[0] if found else ""


def _embedded(model: nn.Module) -> int:
    """How many tokens the model has an embedding for (a head may be wider)."""
    getter = getattr(model, "get_input_embeddings", None)
    table = getattr(getter() if getter else None, "weight", None)
    return len(table) if isinstance(table, Tensor) and table.dim() == 2 else 1 << 62


def _tensor(value: Any) -> Tensor | None:
    """The first tensor of what a module was given or returned."""
    if isinstance(value, Tensor):
        return value
    found = [part for part in value if isinstance(part, Tensor)] if isinstance(value, tuple | list) else []
    return found[0] if found else None


@contextmanager
def _hooked(part: nn.Module, see: Callable[[nn.Module, Seen], Tensor | None]) -> Iterator[None]:
    """Have ``see`` look at every call of a module, and put what it returns, if anything, in the output's place."""

    def ran(module: nn.Module, arguments: Any, keywords: Any, output: Any) -> Any:
        made = _tensor(output)
        if made is None:
            return None
        given = _tensor([*arguments, *keywords.values()])
        # Copies: some models add to what a module returned in place.
        new = see(module, Seen((made if given is None else given).clone(), made.clone()))
        if new is None:
            return None
        return type(output)([new, *output[1:]]) if isinstance(output, tuple | list) else new

    handle = part.register_forward_hook(ran, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _instead(part: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Have a module call ``forward`` instead of doing its work."""
    own: dict[str, Any] = vars(part)
    kept = {"forward": own["forward"]} if "forward" in own else {}
    own["forward"] = forward
    try:
        yield
    finally:
        del own["forward"]
        own.update(kept)


@contextmanager
def _fed(block: nn.Module, change: Change) -> Iterator[None]:
    """Change the first tensor that a block is given."""

    def fed(_: nn.Module, arguments: Any, keywords: Any) -> Any:
        given = _tensor([*arguments, *keywords.values()])

        def swapped(value: Any) -> Any:
            return change(given) if given is not None and value is given else value

        return tuple(map(swapped, arguments)), {name: swapped(value) for name, value in keywords.items()}

    handle = block.register_forward_pre_hook(fed, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
