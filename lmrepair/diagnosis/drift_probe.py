"""A small drift probe: how far a model that is being repaired has moved, on a few positions of short texts.

It is read by steps whose size is found by what they do, and by the watch that stops a repair which is
destroying the model. ``Heard`` lets the watch look for nothing first: at the last states of the failures' own
prompts, which every reading of the failures computes anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmrepair.errors import NotFiniteError
from lmrepair.failures import Tokens, read_kinds
from lmrepair.model import Batch, Net, windows

TEXTS, LENGTH, EVERY = 4, 24, 3  # kinds of shipped text, tokens of each, and which of these are compared
HEARD, LEAST = 8, 4  # positions of prompts that are compared at most, and below how many they say too little


@dataclass(frozen=True)
class Probe:
    """What a net said at n positions of short texts when the probe was made: log-probabilities [n, V] in float32."""

    net: Net
    batch: Batch
    rows: Tensor
    before: Tensor

    @staticmethod
    def of(net: Net) -> Probe:
        """From the first tokens of the shipped kinds of reference text; one forward pass."""
        kinds = [kind.texts[0] for kind in read_kinds()]
        texts = windows(net, kinds[:: max(1, len(kinds) // TEXTS)][:TEXTS])
        texts = [replace(text, target=text.target[:LENGTH]) for text in texts]
        (batch,) = net.batches(texts)
        rows = batch.rows[EVERY - 1 :: EVERY]
        return Probe(net, batch, rows, _said(net, batch, rows))

    def kl(self) -> float:
        """Mean KL(before ‖ now), nats per token; infinite where what the net says now is no number."""
        try:
            return divergence(self.before, _said(self.net, self.batch, self.rows))
        except NotFiniteError:
            return float("inf")


@dataclass(frozen=True)
class Heard:
    """Last states [n, d] at prompt positions of the net as it was, and log-probabilities [n, V] made from them."""

    states: Mapping[Tokens, Tensor]
    before: Tensor

    @staticmethod
    def of(net: Net, states: Mapping[Tokens, Tensor]) -> Heard | None:
        """None for too few positions."""
        kept = _some(states)
        if kept is None or len(kept) < LEAST:
            return None
        return Heard(states, _logs(net, kept))

    def kl(self, net: Net, now: Mapping[Tokens, Tensor]) -> float | None:
        """Mean KL(before ‖ now), nats per position, by the head alone; None where other failures were heard."""
        if list(now) != list(self.states):
            return None
        after = _some(now)
        return divergence(self.before, _logs(net, after)) if after is not None else None


@contextmanager
def listening(net: Net, batches: Sequence[Batch]) -> Iterator[dict[Tokens, Tensor]]:
    """While a reading runs over the batches' failures, in order, keep states of their prompts.

    The last position of a prompt is left out: what it predicts is to be repaired. What was kept is
    there when the block has ended.
    """
    tokens = [item for batch in batches for item in batch.tokens]
    found: dict[Tokens, Tensor] = {}
    passed: list[Tensor] = []
    handle = net.anatomy.head.register_forward_pre_hook(
        lambda _, given: passed.append(given[0].detach().to(net.device))
    )
    try:
        yield found
    finally:
        handle.remove()
    sequences = [sequence for states in passed if states.dim() == 3 for sequence in states]
    for item, states in zip(tokens, sequences, strict=False):
        inside = len(item.prompt) - 1
        if inside > 0 and len(states) >= len(item.ids):
            places = torch.linspace(0, inside - 1, min(HEARD, inside)).round().long()
            found[item] = states[places.to(states.device)].clone()


def divergence(before: Tensor, after: Tensor) -> float:
    """Mean KL(before ‖ after) in nats from log-probabilities [n, V]; infinite where ``after`` is no number."""
    found = float((before.exp() * (before - after)).sum(dim=1).double().mean())
    return max(0.0, found) if found == found else float("inf")


def _some(states: Mapping[Tokens, Tensor]) -> Tensor | None:
    """At most HEARD positions, as many of each of the first failures as that allows."""
    parts = list(states.values())[:HEARD]
    return torch.cat([part[: max(1, HEARD // len(parts))] for part in parts]) if parts else None


def _logs(net: Net, states: Tensor) -> Tensor:
    with torch.inference_mode():
        return net.alone(net.anatomy.head, states).float().log_softmax(dim=-1)


def _said(net: Net, batch: Batch, rows: Tensor) -> Tensor:
    with torch.inference_mode():
        return net.logits(batch, rows).float().log_softmax(dim=1)
