"""A joint closed form along the direct path: state changes at all open positions, over the uppermost layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lmrepair.methods.base import MOMENTS, Method, Problem, Step, metric_of, setting
from lmrepair.methods.keyed import spanned
from lmrepair.methods.targeting import share_of

if TYPE_CHECKING:
    from torch import Tensor

    from lmrepair.methods.maths import Apply, Slopes
    from lmrepair.model import Asked, Batch, Net, Preference, Sites

AIM, SPARE = 1.25, 0.1  # a step aims at AIM·margin + SPARE logits: a little beyond what is checked


@dataclass(frozen=True, kw_only=True)
class Direct(Method):
    """Every open target position is a key; what it lacks is written straight to the last state.

    The wanted change R of the residual stream at a position is the least that raises its margin by what is
    missing, through the final norm and the head to first order. What lies between a layer and the end is
    taken as the identity (the direct path), so the layers' changes add up; one solve shares R out over
    them at the least cost on reference text. Repeated until repaired; positions that become
    wrong are keys of the next step.
    """

    name: ClassVar[str] = "direct"

    epochs: int = setting(20, "most steps for one problem", positive=True)
    margin: float = setting(1.0, "by how many logits a position must be preferred to count as done")
    span: str = setting("1/4", "share of the layers to spread the change over, ending at depth: 1/4, 1/2, …")
    ridge: float = setting(0.1, "slack of the solve, as a share of its system's mean diagonal", positive=True)
    gain: bool = setting(True, "fold the final norm's gain into the semantic bases")
    inputs: str = setting("auto", "how the coefficients' second moment is kept", MOMENTS)
    samples: int = setting(512, "reference positions that sampled moments keep", positive=True)
    damping: float = setting(0.01, "added to the moments, as a share of their mean diagonal", positive=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        share_of(self.span, "span")

    def asks(self) -> Asked:
        from lmrepair.model import Asked

        return Asked(self.inputs, "none", self.samples, self.damping)

    def sites(self, net: Net, batches: Sequence[Batch], preference: Preference) -> Sites:  # noqa: ARG002
        """Every neuron of the uppermost layers."""
        from lmrepair.model import Sites

        every = net.every_site().columns
        return Sites({layer: every[layer] for layer in spanned(net, 1.0, self.span)})

    def read(
        self,
        net: Net,
        batches: Sequence[Batch],
        sites: Sites,
        focus: Tensor | None,
        margin: float | None,
        memory: Any = None,  # noqa: ARG002
    ) -> Slopes:
        from lmrepair.methods.maths import read_slopes

        return read_slopes(net, batches, sites, focus, margin)

    def solve(self, problem: Problem) -> Step:
        import torch

        from lmrepair.methods.maths import Constraints, scaled

        metrics = problem.memory if problem.memory is not None else self._metrics(problem)
        reading: Slopes = problem.reading  # type: ignore[assignment]
        gap = reading.preference.gap
        short = problem.focus & ~(gap < -self.margin)
        rises = gap[short] + AIM * self.margin + SPARE
        constraints = Constraints.of({layer: z[short] for layer, z in reading.coefficients.items()}, metrics)
        wanted = torch.cat([batch.wanted for batch in problem.batches])[short]
        steers = problem.bases.steers(wanted, reading.preference.rival[short])
        changes = constraints.solve(scaled(steers, reading.slopes[short], rises), self.ridge * constraints.scale)
        return Step({layer: problem.deltas[layer] + changes[layer] for layer in problem.deltas}, metrics)

    def _metrics(self, problem: Problem) -> Mapping[int, Apply]:
        from lmrepair.methods.maths import inverse_metric

        metric = metric_of(problem)
        return {layer: inverse_metric(metric.inputs[layer]) for layer in problem.sites.layers}
