"""A joint closed form along the direct path: state changes at all open positions, over the uppermost layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lmrepair.errors import UsageError
from lmrepair.methods.base import MOMENTS, Method, Problem, Step, metric_of, setting
from lmrepair.methods.keyed import spanned
from lmrepair.methods.targeting import share_of

if TYPE_CHECKING:
    from torch import Tensor

    from lmrepair.methods.maths import Apply, Slopes
    from lmrepair.model import Asked, Batch, Net, Preference, Sites

SPREADS = ("upper", "contrast")
AIM, SPARE = 1.25, 0.1  # a step aims at AIM·margin + SPARE logits: a little beyond what is checked


@dataclass(frozen=True, kw_only=True)
class Direct(Method):
    """Every open target position is a key; what it lacks is written straight to the last state.

    The wanted change R of the residual stream at a position is the least that raises its margin by what is
    missing, through the final norm and the head to first order. What lies between a layer and the end is
    taken as the identity (the direct path), so the layers' changes add up; one solve shares R out over
    them at the least cost on reference text. Repeated until repaired; positions that become
    wrong are keys of the next step. The preset ``astra`` keeps to few neurons of the layers that make the contrast.
    """

    name: ClassVar[str] = "direct"
    steers: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "astra": {"epochs": 10, "margin": 5.0, "span": "1/4", "spread": "contrast", "token_neurons": 16,
                  "inputs": "diagonal"},
    }  # fmt: skip

    epochs: int = setting(20, "most steps for one problem", positive=True)
    margin: float = setting(1.0, "by how many logits a position must be preferred to count as done")
    span: str = setting("1/4", "share of the layers to spread the change over, ending at depth: 1/4, 1/2, …")
    spread: str = setting("upper", "which layers these are: the uppermost, or those that make the contrast", SPREADS)
    token_neurons: int = setting(0, "neurons to write to for each answer token, by their contrast; 0: all")
    ridge: float = setting(0.1, "slack of the solve, as a share of its system's mean diagonal", positive=True)
    gain: bool = setting(True, "fold the final norm's gain into the semantic bases")
    inputs: str = setting("auto", "how the coefficients' second moment is kept", MOMENTS)
    samples: int = setting(512, "reference positions that sampled moments keep", positive=True)
    damping: float = setting(0.01, "added to the moments, as a share of their mean diagonal", positive=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        share_of(self.span, "span")
        if self.token_neurons < 0:
            raise UsageError(f"token_neurons is {self.token_neurons}; expected 0 (all of them) or more")

    def asks(self) -> Asked:
        from lmrepair.model import Asked

        return Asked(self.inputs, "none", self.samples, self.damping)

    def sites(self, net: Net, batches: Sequence[Batch], preference: Preference) -> Sites:
        """Every neuron of the uppermost layers, or those of any layers that make the contrast at open positions."""
        from lmrepair.methods.maths import contrasting, read_slopes
        from lmrepair.model import Sites

        every, upper = net.every_site(), spanned(net, 1.0, self.span)
        candidates = every if self.spread == "contrast" else Sites({layer: every.columns[layer] for layer in upper})
        if self.spread == "upper" and not self.token_neurons:
            return candidates
        reading = read_slopes(net, batches, candidates, None, None)
        return contrasting(net, reading, ~(preference.gap < -self.margin), len(upper), self.token_neurons)

    def read(
        self, net: Net, batches: Sequence[Batch], sites: Sites, focus: Tensor | None, margin: float | None,
        memory: Any = None,  # noqa: ARG002
    ) -> Slopes:  # fmt: skip
        from lmrepair.methods.maths import read_slopes

        return read_slopes(net, batches, sites, focus, margin)

    def solve(self, problem: Problem) -> Step:
        import torch

        from lmrepair.methods.maths import Constraints, scaled, undone
        from lmrepair.model import grown

        metrics = problem.memory if problem.memory is not None else self._metrics(problem)
        reading: Slopes = problem.reading  # type: ignore[assignment]
        gap = reading.preference.gap
        short = problem.focus & ~(gap < -self.margin)
        rises = gap[short] + AIM * self.margin + SPARE
        constraints = Constraints.of({layer: z[short] for layer, z in reading.coefficients.items()}, metrics)
        wanted = torch.cat([batch.wanted for batch in problem.batches])[short]
        steers = problem.bases.steers(wanted, reading.preference.rival[short])
        back = {layer: undone(unit) for layer, unit in reading.units.items()}
        shifts, ridge = scaled(steers, reading.slopes[short], rises), self.ridge * constraints.scale
        changes = constraints.changes(problem.net.dtype, shifts, ridge, undone=back)
        return Step({layer: grown(problem.deltas[layer], changes[layer]) for layer in problem.deltas}, metrics)

    def _metrics(self, problem: Problem) -> Mapping[int, Apply]:
        from lmrepair.methods.maths import inverse_metric

        metric = metric_of(problem)
        columns = problem.sites.columns
        return {layer: inverse_metric(metric.restricted(layer, columns[layer].cpu())) for layer in columns}
