"""What a model reads and what it says of it: batches of failures, preferences, readings, sites."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmrepair.failures import Tokens

TOKENS_AT_ONCE = 2048  # padded tokens in one forward pass


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

    @staticmethod
    def of(tokens: Sequence[Tokens], pad: int, device: torch.device) -> Batch:
        """The failures in order, each padded with ``pad`` to the longest."""
        width = max(len(item.ids) for item in tokens)
        ids = torch.full((len(tokens), width), pad)
        mask = torch.zeros_like(ids)
        rows: list[int] = []
        wanted: list[int] = []
        owner: list[int] = []
        for index, item in enumerate(tokens):
            ids[index, : len(item.ids)] = torch.tensor(item.ids)
            mask[index, : len(item.ids)] = 1
            first = index * width + len(item.prompt) - 1
            rows += range(first, first + len(item.target))
            wanted += item.target
            owner += [index] * len(item.target)
        tensors = (ids, mask, torch.tensor(rows), torch.tensor(wanted), torch.tensor(owner))
        return Batch(tuple(tokens), *(tensor.to(device) for tensor in tensors))


def in_turn(tokens: Sequence[Tokens], at_once: int) -> list[list[Tokens]]:
    """The failures in order, in as few groups as keep each below ``at_once`` padded tokens."""
    groups: list[list[Tokens]] = []
    longest = 0
    for item in tokens:
        longest = max(longest, len(item.ids))
        if not groups or longest * (len(groups[-1]) + 1) > at_once:
            groups.append([])
            longest = len(item.ids)
        groups[-1].append(item)
    return groups


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


def drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Tokens [n] drawn from softmax(logits [n, V]): where the summed chances reach a uniform share of their total.

    One random number a row: ``torch.multinomial`` takes one for every token of the vocabulary.
    """
    reached = logits.float().softmax(dim=1).cumsum(dim=1)
    share = 1 - torch.rand(len(logits), 1, generator=generator, device=logits.device)
    return torch.searchsorted(reached, share * reached[:, -1:]).squeeze(1)
