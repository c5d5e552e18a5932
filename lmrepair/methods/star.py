"""STAR: Semantic Targeting for Analytical Repair (arXiv 2503.12899). The maths: docs/methods.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lmrepair.methods.base import Problem, Step, Targeted, setting


@dataclass(frozen=True, kw_only=True)
class Star(Targeted):
    """Magnitude from the analysis, sign from the gradient.

    The prior P is the least change of the chosen neurons that moves the FFN output by the steer at
    every mistake and not at all elsewhere. The step is −learning_rate·|P|⊙sign(g), g the gradient of
    the targets' cross-entropy: where it vanishes, nothing moves.
    """

    name: ClassVar[str] = "star"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"learning_rate": 0.01, "epochs": 10, "early": False, "margin": 0.0, "mode": "batch",
                  "layers": "1", "pattern": "even", "share": "1", "gain": False},
    }  # fmt: skip

    learning_rate: float = setting(0.03, "share of the prior (or the gradient) that one step takes", positive=True)
    epochs: int = setting(60, "most steps for one problem", positive=True)
    share: str = setting("1/4", "share of neurons to write to, by attribution: 1, 1/4, 1/16, …")
    gain: bool = setting(False, "fold the final norm's gain into the semantic bases")

    def solve(self, problem: Problem) -> Step:
        import torch

        from lmrepair.basis import by_spread, prior_factors

        preference, rows = problem.reading.preference, problem.focus
        mistaken = ~(preference.gap[rows] < -self.margin)
        wanted = torch.cat([batch.wanted for batch in problem.batches])[rows]
        steers = torch.zeros(len(wanted), problem.net.hidden, dtype=torch.float64, device=wanted.device)
        if bool(mistaken.any()):
            steers[mistaken] = by_spread(problem.bases.steers(wanted[mistaken], preference.rival[rows][mistaken]))
        deltas = {}
        for layer, gradient in problem.reading.gradients.items():
            z = problem.reading.coefficients[layer][rows]
            prior = z.T @ prior_factors(z, steers).float()
            deltas[layer] = problem.deltas[layer] - self.learning_rate * prior.abs() * gradient.sign()
        return Step(deltas)
