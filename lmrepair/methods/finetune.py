"""Fine-tuning of FFN output projections with Adam until the failures are repaired: a yardstick."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lmrepair.methods.base import Paced, Paces, Problem, Step, margin_needs_early, setting
from lmrepair.methods.maths import Moments, adam

if TYPE_CHECKING:
    from lmrepair.methods.base import Lead


@dataclass(frozen=True)
class _Memory:
    """Adam's moments, and how the last step went where its size was found."""

    moments: Moments | None
    paces: Paces | None = None


@dataclass(frozen=True, kw_only=True)
class FineTune(Paced):
    """Adam (arXiv 1412.6980) on the cross-entropy of the targets, on all FFN output projections."""

    name: ClassVar[str] = "finetune"

    epochs: int = setting(60, "most steps for one problem", positive=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        margin_needs_early(self)

    def solve(self, problem: Problem) -> Step:
        from lmrepair.methods.maths import steepest

        known: _Memory | None = problem.memory if problem.step else None
        before = known.moments if known is not None else None
        gradients = problem.reading.gradients
        if self.learning_rate:
            moves, moments = adam(gradients, before, self.learning_rate)
            return Step({layer: problem.deltas[layer] + move for layer, move in moves.items()}, _Memory(moments))
        kept = before

        def lead(sizes: Mapping[int, float]) -> Lead:
            nonlocal kept
            # In units of the weights, so that what Adam adds to a spread is a share of the same size everywhere.
            moves, kept = adam({layer: sizes[layer] * g for layer, g in gradients.items()}, before, 1.0)
            return steepest(problem.deltas, moves, gradients, sizes)

        paces = self.paced(problem, known.paces if known is not None else None, lead)
        return Step(paces.way.end, _Memory(kept, paces))
