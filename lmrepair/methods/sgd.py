"""Plain gradient steps on the targets' cross-entropy, as published for comparison (arXiv 2503.12899)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lmrepair.methods.base import Problem, Step, Targeted, margin_needs_early, setting


@dataclass(frozen=True, kw_only=True)
class Sgd(Targeted):
    """10 gradient steps with learning rate 0.01 on all FFN output projections, unless set otherwise."""

    name: ClassVar[str] = "sgd"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"learning_rate": 0.01, "epochs": 10, "early": False, "mode": "batch"},
    }

    learning_rate: float = setting(0.01, "share of the prior (or the gradient) that one step takes", positive=True)
    epochs: int = setting(10, "most steps for one problem", positive=True)
    early: bool = setting(False, "stop as soon as every position is preferred")

    def __post_init__(self) -> None:
        super().__post_init__()
        margin_needs_early(self)

    def solve(self, problem: Problem) -> Step:
        gradients = problem.reading.gradients
        return Step({layer: problem.deltas[layer] - self.learning_rate * gradients[layer] for layer in gradients})
