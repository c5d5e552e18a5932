"""A patch as factors: what an adapter of low rank holds, exactly or cut to the least rank that still repairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmrepair.diagnosis import diagnose
from lmrepair.errors import PatchError, UsageError
from lmrepair.model import Change, LowRank, Net, Trial, greedy
from lmrepair.patch.patch import Patch

EXACT = 1e-6  # singular values below this share of the largest are the rounding of float32
SERVED = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # ranks that vLLM has kernels for


@dataclass(frozen=True)
class Factors:
    """Layer → A [r, m] and B [d, r], float32: the change of the projection W [d, m] is B A."""

    layers: Mapping[int, tuple[Tensor, Tensor]]

    @property
    def ranks(self) -> dict[int, int]:
        return {layer: len(a) for layer, (a, _) in self.layers.items()}

    @property
    def rank(self) -> int:
        return max(self.ranks.values())

    @property
    def bytes(self) -> int:
        return sum(part.numel() * part.element_size() for pair in self.layers.values() for part in pair)

    def cut(self, rank: int) -> Factors:
        """The nearest factors (in the Frobenius norm) of at most this rank in each layer."""
        return Factors(
            {layer: pair if len(pair[0]) <= rank else _cut(*pair, rank) for layer, pair in self.layers.items()}
        )

    def padded(self, rank: int) -> Factors:
        """The same change with zeros up to this rank in every layer. Raises UsageError for a rank that is too small."""
        if rank < self.rank:
            raise UsageError(f"rank {rank} is too small: a layer of the patch has rank {self.rank}")

        def pad(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            more = rank - len(a)
            return torch.cat([a, a.new_zeros(more, a.shape[1])]), torch.cat([b, b.new_zeros(len(b), more)], dim=1)

        return Factors({layer: pad(*pair) for layer, pair in self.layers.items()})

    def served(self) -> Factors:
        """Padded to the next rank that vLLM serves. Raises UsageError where there is none."""
        fitting = [rank for rank in SERVED if rank >= self.rank]
        if not fitting:
            raise UsageError(f"the patch has rank {self.rank}, vLLM serves at most {SERVED[-1]}; cut it with --rank")
        return self.padded(fitting[0])


def refuse_experts(mixtures: Sequence[int]) -> None:
    """Raise UsageError where layers that are mixtures of experts change: no adapter is written for these."""
    if mixtures:
        raise UsageError(
            f"layers {sorted(mixtures)} are mixtures of experts, and adapters for experts are not written; serve the "
            "patched model itself: lmrepair apply, or --to merged"
        )


def exact(patch: Patch, widths: Mapping[int, int]) -> Factors:
    """The factors of a patch for projections of ``widths`` neurons: one-hot rows of A, or the deltas' own rank if less.

    Raises PatchError for a layer that the model does not have, or a neuron that it has no room for, UsageError for
    a mixture of experts: what a LoRA does to an expert differs from engine to engine.
    """
    refuse_experts(patch.mixtures)
    found = {}
    for layer, change in patch.changes.items():
        if layer not in widths or int(change.columns[-1]) >= widths[layer]:
            raise PatchError(
                f"the patch changes layer {layer}, neuron {int(change.columns[-1])}; the model has none such"
            )
        width = widths[layer]
        found[layer] = change.factors(width) if isinstance(change, LowRank) else _exact(change, width)
    return Factors(found)


def _exact(change: Change, width: int) -> tuple[Tensor, Tensor]:
    left, values, right = torch.linalg.svd(change.deltas.double(), full_matrices=False)
    rank = max(1, int((values > EXACT * values[0]).sum()))
    if rank == len(change.columns):
        picks = torch.zeros(rank, width)
        picks[torch.arange(rank), change.columns] = 1.0
        return picks, change.deltas.T.contiguous()
    root = values[:rank].sqrt()
    a = torch.zeros(rank, width)
    a[:, change.columns] = (left[:, :rank] * root).T.float()
    return a, (right[:rank].T * root).float().contiguous()


def _cut(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    qa, ra = torch.linalg.qr(a.double().T)
    qb, rb = torch.linalg.qr(b.double())
    left, values, right = torch.linalg.svd(rb @ ra.T)
    root = values[:rank].sqrt()
    return (root[:, None] * (right[:rank] @ qa.T)).float(), (qb @ left[:, :rank] * root).float()


@dataclass(frozen=True)
class Held:
    """How many of the ``claimed`` failures hold at a ``rank``, token by token and as greedy text; ids of the lost."""

    rank: int
    kept: int
    claimed: int
    lost: tuple[str, ...]


def held(net: Net, patch: Patch, factors: Factors) -> Held:
    """What the failures that a patch repairs come to with these factors on the net, which is left as it was."""
    deltas = {}
    for layer, (a, b) in factors.layers.items():
        deltas[layer] = (b @ a).T[patch.changes[layer].columns]
    with Trial(net, patch.sites()) as trial:
        trial.write(deltas)
        return holding(patch, factors.rank, *answers(net, patch))


def held_whole(net: Net, patch: Patch) -> Held:
    """The same for the patch as it is."""
    with patch.on(net):
        return holding(patch, 0, *answers(net, patch))


def answers(net: Net, patch: Patch) -> tuple[Sequence[bool], Sequence[tuple[int, ...]]]:
    """For each of the patch's failures: whether every token is preferred, and the greedy text as far as it is right."""
    tokens = [item.tokens for item in patch.items]
    found = diagnose(net, tokens)
    return [not one.mistakes for one in found], greedy(net, tokens, until_wrong=True)


def holding(patch: Patch, rank: int, right: Sequence[bool], texts: Sequence[tuple[int, ...]]) -> Held:
    """Answers counted: a failure holds if it is preferred token by token and comes out as greedy text."""
    claims = [
        (item, ok and text == item.tokens.target) for item, ok, text in zip(patch.items, right, texts, strict=True)
    ]
    claimed = [(item, ok) for item, ok in claims if item.repaired]
    lost = tuple(item.tokens.id for item, ok in claimed if not ok)
    return Held(rank, len(claimed) - len(lost), len(claimed), lost)


def least(net: Net, patch: Patch, factors: Factors, look: Callable[[Held], None] = lambda _: None) -> Factors:
    """The factors cut to the least rank at which every repaired failure holds, by doubling and halving.

    What holds need not hold at every rank above; the rank given is one that was seen to hold, and the one below it
    was seen not to. ``look`` is shown every rank tried. Raises PatchError where the whole patch does not hold.
    """

    def holds(rank: int) -> bool:
        found = held(net, patch, factors.cut(rank))
        look(found)
        return not found.lost

    low, high = 0, 1
    while not holds(high):
        if high >= factors.rank:
            raise PatchError("the patch's repairs do not hold on this model, at any rank; lmrepair verify says which")
        low, high = high, min(2 * high, factors.rank)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return factors.cut(high)
