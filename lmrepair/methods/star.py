"""STAR: Semantic Targeting for Analytical Repair (arXiv 2503.12899). The maths: docs/methods.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lmrepair.methods.base import Paced, Paces, Problem, Step, setting

if TYPE_CHECKING:
    from torch import Tensor

    from lmrepair.methods.maths import Apply
    from lmrepair.model import Asked

METRICS = ("identity", "diagonal", "sampled", "full")


@dataclass(frozen=True)
class _Memory:
    """Layer → M of the chosen neurons (None: the identity), and how the last step went."""

    metrics: Mapping[int, Apply] | None
    paces: Paces | None = None


@dataclass(frozen=True, kw_only=True)
class Star(Paced):
    """Magnitude from the analysis, sign from the gradient.

    The prior P is the least change of the chosen neurons that moves the FFN output by the steer at
    every mistake and not at all elsewhere. The step goes along −|P|⊙sign(g), g the gradient of the targets'
    cross-entropy: where it vanishes, nothing moves. How far: ``learning_rate``, or as far as loss and probe
    allow, with the layers' moves in the proportions in which they lower the loss. ``metric`` says what least
    means: of the entries (as published), or of what the change does on reference text.
    """

    name: ClassVar[str] = "star"
    steers: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"learning_rate": 0.01, "epochs": 10, "early": False, "margin": 0.0, "mode": "batch",
                  "layers": "1", "pattern": "even", "share": "1", "gain": False, "metric": "identity"},
    }  # fmt: skip

    epochs: int = setting(60, "most steps for one problem", positive=True)
    share: str = setting("1/4", "share of neurons to write to, by attribution: 1, 1/4, 1/16, …")
    gain: bool = setting(True, "fold the final norm's gain into the semantic bases")
    metric: str = setting("diagonal", "how the prior is measured: C⁻¹ of reference text, or not at all", METRICS)
    samples: int = setting(512, "reference positions that sampled moments keep", positive=True)
    damping: float = setting(0.01, "added to the moments, as a share of their mean diagonal", positive=True)

    def asks(self) -> Asked | None:
        from lmrepair.model import Asked

        return None if self.metric == "identity" else Asked(self.metric, "none", self.samples, self.damping)

    def solve(self, problem: Problem) -> Step:
        import torch

        from lmrepair.methods.maths import Constraints, by_spread, steepest

        preference, rows = problem.reading.preference, problem.focus
        mistaken = ~(preference.gap[rows] < -self.margin)
        wanted = torch.cat([batch.wanted for batch in problem.batches])[rows]
        steers = torch.zeros(len(wanted), problem.net.hidden, dtype=torch.float64, device=wanted.device)
        if bool(mistaken.any()):
            steers[mistaken] = by_spread(problem.bases.steers(wanted[mistaken], preference.rival[rows][mistaken]))
        known: _Memory | None = problem.memory
        metrics = known.metrics if known is not None else self._metrics(problem)
        gradients = problem.reading.gradients

        def move() -> dict[int, Tensor]:
            found = {}
            for layer, gradient in gradients.items():
                keys = {layer: problem.reading.coefficients[layer][rows]}
                found[layer] = -Constraints.of(keys, metrics).solve(steers)[layer].abs() * gradient.sign()
            return found

        if self.learning_rate:
            deltas = {layer: problem.deltas[layer] + self.learning_rate * part for layer, part in move().items()}
            return Step(deltas, _Memory(metrics))
        paces = self.paced(
            problem,
            known.paces if known is not None and problem.step else None,
            lambda sizes: steepest(problem.deltas, move(), gradients, sizes),
        )
        return Step(paces.way.end, _Memory(metrics, paces))

    def _metrics(self, problem: Problem) -> dict[int, Apply] | None:
        """Layer → M of the chosen neurons; None for the identity."""
        from lmrepair.methods.base import metric_of
        from lmrepair.methods.maths import inverse_metric

        if self.metric == "identity":
            return None
        metric = metric_of(problem)
        columns = problem.sites.columns
        return {layer: inverse_metric(metric.restricted(layer, columns[layer].cpu())) for layer in columns}
