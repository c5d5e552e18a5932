"""Steps as values: Adam's moves (arXiv 1412.6980), and how far to go along any move.

Nothing of the second is in units of weights or states. With L the loss at the start of a step and s its slope along
the way (how fast it falls), a length of descent·L / s takes a share of the loss away to first order (Polyak's
step, 10.1016/0041-5553(69)90035-4, for a loss whose least is 0). It is shortened until the mean KL(before ‖ after)
on the probe has risen by at most ``stride`` nats per token, less where earlier steps have spent some: KL grows with
the square of a length, so the next try is the root of what is allowed. Where the loss has risen after all, the same
way is gone again, a quarter as far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from lmrepair.model import Net, Sites

    Deltas = Mapping[int, Tensor]
    Probing = Callable[[Deltas], float]

FIRST, SECOND, EPSILON = 0.9, 0.999, 1e-8
TRIES, SHORTER, CLOSE = 12, 0.25, 0.9  # shortenings at most; by how much after a rise; share of the root to aim at
STRIDES, LEAST = 4.0, 1 / 3  # a stride shrinks by the share of so many that is spent; the share of it that stays
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Moments:
    """Running means of gradients and of their squares, by the same keys; ``steps`` made so far."""

    first: Mapping[Hashable, Tensor]
    second: Mapping[Hashable, Tensor]
    steps: int


def adam(
    gradients: Mapping[Key, Tensor], moments: Moments | None, learning_rate: float
) -> tuple[dict[Key, Tensor], Moments]:
    """What one step adds to each parameter, and the moments after it; None: no step was made before."""
    steps = moments.steps + 1 if moments else 1
    first: dict[Hashable, Tensor] = {}
    second: dict[Hashable, Tensor] = {}
    moves: dict[Key, Tensor] = {}
    for key, gradient in gradients.items():
        first[key] = (1 - FIRST) * gradient + (FIRST * moments.first[key] if moments else 0.0)
        second[key] = (1 - SECOND) * gradient.square() + (SECOND * moments.second[key] if moments else 0.0)
        spread = (second[key] / (1 - SECOND**steps)).sqrt_().add_(EPSILON)
        moves[key] = first[key] / spread * (-learning_rate / (1 - FIRST**steps))
    return moves, Moments(first, second, steps)


@dataclass(frozen=True)
class Way:
    """One step's way: ``at`` gives the whole change at a length, ``slope`` how fast the loss falls, per length.

    ``loss`` and ``kl`` (on the probe) are those at its start; ``length`` is how far was gone, ``reached`` the KL there.
    """

    at: Callable[[float], Deltas]
    slope: float
    loss: float
    kl: float
    length: float = 0.0
    reached: float = 0.0

    @property
    def end(self) -> Deltas:
        return self.at(self.length)


def stride_after(kl: float, stride: float) -> float:
    """How much the next step may add to ``kl`` on the probe: less of ``stride`` the more is spent, LEAST of it always.

    Else a failure that takes many steps pays as much for the last ones, which close little, as for the first.
    """
    return stride * max(LEAST, 1.0 - kl / (STRIDES * stride))


def go(way: Way, probe: Probing, descent: float, stride: float) -> Way:
    """The way gone as far as ``descent`` and ``stride`` allow."""
    length = descent * way.loss / way.slope if way.slope > 0 else 0.0
    return within(replace(way, length=length), probe, stride)


def again(way: Way, probe: Probing, stride: float) -> Way:
    """The same way from its start, a quarter as far: it had led to a larger loss."""
    return within(replace(way, length=SHORTER * way.length), probe, stride)


def within(way: Way, probe: Probing, stride: float) -> Way:
    """The way shortened until the KL on the probe has risen by at most ``stride``."""
    for _ in range(TRIES):
        kl = probe(way.end)
        way = replace(way, reached=kl)
        if kl <= way.kl + stride:
            break
        root = CLOSE * math.sqrt(stride / (kl - way.kl)) if math.isfinite(kl) else 0.0
        way = replace(way, length=way.length * min(0.5, max(0.05, root)))
    return way


def units(net: Net, sites: Sites) -> dict[int, float]:
    """Layer → root mean square of the chosen neurons' weights: what a change of them is a share of."""
    found = {}
    for layer, columns in sites.columns.items():
        neurons = net.columns(layer)
        chosen = neurons if len(columns) == len(neurons) else neurons[columns.to(neurons.device)]
        found[layer] = float(chosen.float().square().mean().sqrt())
    return found


def steepest(
    start: Deltas, moves: Deltas, gradients: Deltas, sizes: Mapping[int, float]
) -> tuple[Callable[[float], Deltas], float]:
    """The steepest mixture of the layers' moves from ``start``: the change at a length, and how fast the loss falls.

    Each layer's move is brought to the size of its weights, and then weighed by how fast the loss falls along it:
    of all weights w with Σ w² fixed, w_l ∝ −⟨g_l, m_l⟩ falls fastest. Layers whose move leads uphill stay. Scaling a
    layer's weights and, against it, what they multiply or what follows leaves the mixture as it is.
    """
    import torch

    falls, sized = {}, {}
    for layer, move in moves.items():
        size = float(move.square().mean().sqrt())
        sized[layer] = move * (sizes[layer] / size if size > 0 else 0.0)
        falls[layer] = max(0.0, -float(torch.vdot(gradients[layer].reshape(-1), sized[layer].reshape(-1))))
    top = max(falls.values(), default=0.0)
    if top <= 0:
        return lambda _: start, 0.0
    mixed = {layer: move * (falls[layer] / top) for layer, move in sized.items()}
    slope = sum(fall * fall for fall in falls.values()) / top
    return lambda length: {layer: delta + length * mixed[layer] for layer, delta in start.items()}, slope
