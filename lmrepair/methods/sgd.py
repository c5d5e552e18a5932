"""Plain gradient steps on the targets' cross-entropy, as published for comparison (arXiv 2503.12899)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lmrepair.methods.base import Paced, Paces, Problem, Step, margin_needs_early, setting


@dataclass(frozen=True, kw_only=True)
class Sgd(Paced):
    """10 gradient steps on all FFN output projections, unless set otherwise."""

    name: ClassVar[str] = "sgd"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"learning_rate": 0.01, "epochs": 10, "early": False, "mode": "batch"},
    }

    early: bool = setting(False, "stop as soon as every position is preferred")

    def __post_init__(self) -> None:
        super().__post_init__()
        margin_needs_early(self)

    def solve(self, problem: Problem) -> Step:
        gradients = problem.reading.gradients
        if self.learning_rate:
            return Step({layer: problem.deltas[layer] - self.learning_rate * gradients[layer] for layer in gradients})
        from lmrepair.methods.maths import steepest

        known: Paces | None = problem.memory if problem.step else None
        down = {layer: -gradient for layer, gradient in gradients.items()}
        paces = self.paced(problem, known, lambda sizes: steepest(problem.deltas, down, gradients, sizes))
        return Step(paces.way.end, paces)
