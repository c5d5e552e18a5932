"""What a model reads and what it says of it: batches of failures, preferences, readings, sites."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmrepair.failures import Tokens


@dataclass(frozen=True)
class Sites:
    """Where a repair may write: layer → neuron indices [k], sorted."""

    columns: Mapping[int, Tensor]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(self.columns))

    @property
    def count(self) -> int:
        return sum(len(columns) for columns in self.columns.values())


@dataclass(frozen=True)
class Batch:
    """Failures side by side, padded on the right (a causal model never sees that padding).

    ``ids``, ``mask``: [B, T]. One row for each target token, failures in order: ``rows`` [N] is where
    it is predicted from (flat index into B·T), ``wanted`` [N] the token, ``owner`` [N] its failure.
    """

    tokens: tuple[Tokens, ...]
    ids: Tensor
    mask: Tensor
    rows: Tensor
    wanted: Tensor
    owner: Tensor


@dataclass(frozen=True)
class Preference:
    """What a model prefers at N positions: the best ``rival`` [N] of the wanted token, and by how much.

    ``gap`` [N] = logit of the rival − logit of the wanted token: a mistake where it is not negative.
    ``loss`` [N] is the cross-entropy of the wanted token, in nats.
    """

    rival: Tensor
    gap: Tensor
    loss: Tensor

    def holds(self, focus: Tensor | None, margin: float) -> bool:
        """Whether every position in ``focus`` [N] (None: all) is preferred by more than ``margin`` logits."""
        gap = self.gap if focus is None else self.gap[focus]
        return bool((gap < -margin).all())

    @staticmethod
    def of(logits: Tensor, wanted: Tensor) -> Preference:
        """From logits [N, V] (any float dtype; compared in float32) and the wanted tokens [N]."""
        logits = logits.float()
        chosen = logits.gather(1, wanted[:, None]).squeeze(1)
        others = logits.scatter(1, wanted[:, None], float("-inf"))
        best, rival = others.max(dim=1)
        return Preference(rival, best - chosen, torch.logsumexp(logits, dim=1) - chosen)

    @staticmethod
    def join(parts: Sequence[Preference]) -> Preference:
        return Preference(*(torch.cat([getattr(part, name) for part in parts]) for name in ("rival", "gap", "loss")))


@dataclass(frozen=True)
class Reading:
    """What one pass over the failures tells a method.

    ``done``: whether nothing was left to do. ``coefficients``: layer → Z [N, k], what the chosen neurons
    of that layer were multiplied by at the N positions. ``gradients``: layer → [k, d], of the mean
    cross-entropy of the positions in focus, with respect to the chosen neurons. Both are empty where
    nothing was left to do, or where the method does not read them.
    """

    preference: Preference
    done: bool
    coefficients: Mapping[int, Tensor] = field(default_factory=dict)
    gradients: Mapping[int, Tensor] = field(default_factory=dict)


class Inputs(Mapping[int, Tensor]):
    """Layer → the coefficients of its neurons, [B, T, m]; those of a mixture are put together each time they are
    asked for, so that not all layers' are in memory at once."""

    def __init__(self) -> None:
        self.made: dict[int, Callable[[], Tensor]] = {}

    def __getitem__(self, layer: int) -> Tensor:
        return self.made[layer]()

    def __iter__(self) -> Iterator[int]:
        return iter(self.made)

    def __len__(self) -> int:
        return len(self.made)


@dataclass(frozen=True)
class Watched:
    """Layer → its neurons' coefficients [B, T, m] and its FFN's output [B, T, d] in the last forward pass."""

    inputs: Mapping[int, Tensor]
    outputs: Mapping[int, Tensor]
