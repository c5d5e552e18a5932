"""From what the head reads to logits, as the model itself makes them, a block of positions at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lmrepair.failures import Tokens
from lmrepair.model.batches import Batch
from lmrepair.model.net import Net

ALIKE = {torch.float32: 1e-5, torch.float64: 1e-9}  # of the largest logit: where head and model agree; else COARSE
COARSE = 1e-2
LOGITS_AT_ONCE = 1 << 24  # numbers: 64 MB in float32
POSITIONS_AT_ONCE = 128  # enough that a product with the head is not a matter of reading the head
PROBE = 8  # positions at which head and model are compared


@dataclass(frozen=True)
class Head:
    """The way from states [n, d] to logits [n, V]: the head, and a ``scale`` or a ``cap`` c (c·tanh(x/c)) behind it.

    ``whole``: the model does something else there, and its own logits stand in for the states.
    """

    net: Net
    scale: float = 1.0
    cap: float = 0.0
    whole: bool = False

    @staticmethod
    def of(net: Net, text: Tokens) -> Head:
        """The form whose logits are the model's at the first positions of a text."""
        (batch,) = net.batches([replace(text, target=text.target[:PROBE])])
        with torch.inference_mode():
            told, states = net.logits_and_states(batch)
            raw, wanted = net.alone(net.anatomy.head, states)[0].double(), told.double()
        config: Any = net.model.config.get_text_config()
        cap = getattr(config, "final_logit_softcapping", None) or 0.0
        scale = float((raw * wanted).sum() / raw.square().sum().clamp(min=1e-300))
        for found in (Head(net), Head(net, cap=float(cap)), Head(net, scale=scale)):
            if _alike(found.shaped(raw), wanted, net.dtype):
                return found
        return Head(net, whole=True)

    @property
    def positions(self) -> int:
        """How many positions' logits are made at once."""
        return max(1, min(POSITIONS_AT_ONCE, LOGITS_AT_ONCE // self.net.anatomy.vocabulary))

    def seen(self, batch: Batch, rows: Tensor | None = None) -> Tensor:
        """What ``logits`` makes logits of, at flat positions of a batch (default: its target's): one forward pass."""
        if self.whole:
            return self.net.logits(batch, rows)
        _, states = self.net.logits_and_states(batch, rows, shown=1)
        return states[0]

    def logits(self, seen: Tensor) -> Tensor:
        """Logits [n, V] of rows that were ``seen``."""
        return seen if self.whole else self.shaped(self.net.alone(self.net.anatomy.head, seen[None])[0])

    def shaped(self, raw: Tensor) -> Tensor:
        """What the head says, with what follows it."""
        if self.cap:
            return torch.tanh(raw / self.cap) * self.cap
        return raw if self.scale == 1 else raw * self.scale


def _alike(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    return float((found - wanted).abs().max()) <= ALIKE.get(dtype, COARSE) * float(wanted.abs().max())
