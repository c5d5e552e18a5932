"""What follows the last FFN: the final norm and the head, run on the positions that matter alone.

A change of the last layer's neurons adds to the states in front of the final norm and reaches nothing
else, so its effect on every margin is had without running the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmrepair.model import Net, Preference, rows, weight

ALIKE = 1e-3  # of the largest value: where the tail and the model agree


@dataclass(frozen=True)
class Tail:
    """N positions in front of the final norm: ``states`` [N, d], coefficients ``inputs`` [N, k], ``wanted`` [N]."""

    net: Net
    states: Tensor
    inputs: Tensor
    wanted: Tensor

    @staticmethod
    def join(parts: Sequence[Tail]) -> Tail:
        columns = (torch.cat([getattr(part, name) for part in parts]) for name in ("states", "inputs", "wanted"))
        return Tail(parts[0].net, *columns)

    def read(self, moved: Tensor) -> tuple[Preference, Tensor]:
        """What is preferred with the states moved by ``moved`` [N, d], and the margins' slopes there, [N, d].

        Behind the norm the head is linear: a margin's slope is the difference of two of its rows.
        """
        norm, head = self.net.anatomy.norm, self.net.anatomy.head
        assert norm is not None
        with torch.enable_grad():
            states = (self.states.float() + moved).to(self.states.dtype).requires_grad_()
            seen = self.net.alone(norm, states[None])
        with torch.no_grad():
            preference = Preference.of(self.net.alone(head, seen)[0], self.wanted)
            ahead = rows(weight(head), self.wanted) - rows(weight(head), preference.rival)
        (slopes,) = torch.autograd.grad(seen, states, ahead[None].to(seen))
        return preference, slopes.float()

    def agreed(self, preference: Preference, rows: Tensor, slopes: Tensor) -> tuple[Preference, Tensor] | None:
        """What is read with nothing moved, if the model sees the same margins and the same slopes [n, d] of rows [n].

        It does not where something lies between the FFN's output and the state (a norm of its own), or
        between the head and the logits (a cap, a scale).
        """
        found, made = self.read(torch.zeros_like(self.states, dtype=torch.float32))
        gaps = torch.stack([found.gap, preference.gap])
        near = float((gaps[0] - gaps[1]).abs().max()) <= ALIKE * max(1.0, float(gaps.abs().max()))
        alike = near and float((made[rows] - slopes).abs().max()) <= ALIKE * max(1e-6, float(slopes.abs().max()))
        return (found, made) if alike else None


@contextmanager
def states_before_norm(net: Net) -> Iterator[list[Tensor]]:
    """The states [B, T, d] that the final norm reads in forward passes; none where the model has no such norm."""
    found: list[Tensor] = []
    norm = net.anatomy.norm

    def keep(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        found.append(given[0].detach().to(net.device))

    handle = norm.register_forward_pre_hook(keep) if norm is not None else None
    try:
        yield found
    finally:
        if handle is not None:
            handle.remove()
