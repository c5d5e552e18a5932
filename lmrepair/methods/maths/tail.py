"""What follows the last FFN: a norm of its own where it has one, the final norm and the head, run on the positions
that matter alone.

A change of the last layer's neurons adds to what that FFN puts out and reaches nothing else, so its effect on every
margin is had without running the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lmrepair.model import Net, Preference, rows, weight

ALIKE = 1e-3  # of the largest value: where the tail and the model agree
RIVALS = 256  # tokens a position that are looked at again, once all have been
NUMBERS_AT_ONCE = 1 << 24  # of rows of the head: 64 MB in float32


@dataclass(frozen=True)
class Tail:
    """N positions: ``states`` [N, d] in front of the final norm, the last FFN's ``outputs`` [N, d], the coefficients
    ``inputs`` [N, k] of its neurons, the tokens ``wanted`` [N].

    ``among`` [N, r + 1]: the wanted token and those of its rivals that are looked at (None: all).
    """

    net: Net
    states: Tensor
    outputs: Tensor
    inputs: Tensor
    wanted: Tensor
    among: Tensor | None = None

    @staticmethod
    def join(parts: Sequence[Tail]) -> Tail:
        columns = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("states", "outputs", "inputs", "wanted")
        )
        return Tail(parts[0].net, *columns)

    def read(self, moved: Tensor) -> tuple[Preference, Tensor]:
        """What is preferred with the outputs moved by ``moved`` [N, d], and the margins' slopes there, [N, d].

        Behind the norm the head is linear: a margin's slope is the difference of two of its rows.
        """
        seen, moved = self._seen(moved)
        preference, _ = self._preferred(seen)
        return preference, self._slopes(seen, moved, preference)

    def agreed(self, preference: Preference, rows: Tensor, slopes: Tensor) -> tuple[Tail, Preference, Tensor] | None:
        """What is read with nothing moved, if the model sees the same margins and the same slopes [n, d] of rows [n];
        and the tail from which the likeliest rivals alone are read.

        It does not where something else lies between the FFN's output and the state (a scale), or between the head
        and the logits (a cap, a scale).
        """
        seen, moved = self._seen(torch.zeros_like(self.states, dtype=torch.float32))
        found, logits = self._preferred(seen)
        gaps = torch.stack([found.gap, preference.gap])
        near = float((gaps[0] - gaps[1]).abs().max()) <= ALIKE * max(1.0, float(gaps.abs().max()))
        if not near:
            return None
        made = self._slopes(seen, moved, found)
        alike = float((made[rows] - slopes).abs().max()) <= ALIKE * max(1e-6, float(slopes.abs().max()))
        return (self._narrowed(logits), found, made) if alike else None

    def _seen(self, moved: Tensor) -> tuple[Tensor, Tensor]:
        """What the head reads, [1, N, d], with a graph from ``moved``, which is returned too."""
        norm = self.net.anatomy.norm
        assert norm is not None
        with torch.enable_grad():
            moved = moved.detach().requires_grad_()
            states = (self.states.float() + self._added(moved)).to(self.states.dtype)
            return self.net.alone(norm, states[None]), moved

    def _added(self, moved: Tensor) -> Tensor:
        """What outputs that are ``moved`` add to the states, [N, d]."""
        norm = self.net.anatomy.behind[-1]
        if norm is None:
            return moved
        beside = torch.stack([self.outputs.float() + moved, self.outputs.float()])
        after, before = self.net.alone(norm.module, beside.to(self.outputs.dtype)).float().unbind()
        return after - before

    @torch.no_grad()
    def _preferred(self, seen: Tensor) -> tuple[Preference, Tensor]:
        """With the logits that tell it; the loss is that among them."""
        head = self.net.anatomy.head
        if self.among is None:
            logits = self.net.alone(head, seen)[0]
            return Preference.of(logits, self.wanted), logits
        some = rows(weight(head), self.among.flatten()).unflatten(0, self.among.shape)
        logits = (some @ seen[0, :, :, None]).squeeze(2)
        found = Preference.of(logits, torch.zeros_like(self.wanted))
        return replace(found, rival=self.among.gather(1, found.rival[:, None]).squeeze(1)), logits

    def _slopes(self, seen: Tensor, moved: Tensor, preference: Preference) -> Tensor:
        stored = weight(self.net.anatomy.head)
        ahead = rows(stored, self.wanted) - rows(stored, preference.rival)
        (slopes,) = torch.autograd.grad(seen, moved, ahead[None].to(seen))
        return slopes

    def _narrowed(self, logits: Tensor) -> Tail:
        """With the likeliest tokens [N, V] as rivals alone; with all, where these are hardly fewer or have a bias."""
        count = min(RIVALS, NUMBERS_AT_ONCE // self.states.numel() - 1)
        if count < 1 or 4 * count > logits.shape[1] or getattr(self.net.anatomy.head, "bias", None) is not None:
            return self
        others = logits.scatter(1, self.wanted[:, None], float("-inf"))
        return replace(self, among=torch.cat([self.wanted[:, None], others.topk(count, dim=1).indices], dim=1))


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
