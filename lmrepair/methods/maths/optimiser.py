"""Adam's steps (arXiv 1412.6980) as values: gradients and moments in, moves and moments out."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

FIRST, SECOND, EPSILON = 0.9, 0.999, 1e-8
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
