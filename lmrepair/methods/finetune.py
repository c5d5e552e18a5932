"""Fine-tuning of FFN output projections with Adam until the failures are repaired: a yardstick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lmrepair.methods.base import Problem, Step, Targeted, margin_needs_early, setting
from lmrepair.methods.maths import adam


@dataclass(frozen=True, kw_only=True)
class FineTune(Targeted):
    """Adam (arXiv 1412.6980) on the cross-entropy of the targets, on all FFN output projections."""

    name: ClassVar[str] = "finetune"

    learning_rate: float = setting(3e-4, "share of the prior (or the gradient) that one step takes", positive=True)
    epochs: int = setting(60, "most steps for one problem", positive=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        margin_needs_early(self)

    def solve(self, problem: Problem) -> Step:
        known = problem.memory if problem.step else None
        moves, moments = adam(problem.reading.gradients, known, self.learning_rate)
        return Step({layer: problem.deltas[layer] + move for layer, move in moves.items()}, moments)
