"""MEMIT (arXiv 2210.07229) and AlphaEdit (2410.02355): values over several layers. The maths: docs/methods.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lmrepair.methods.base import Problem, metric_of, setting
from lmrepair.methods.keyed.keyed import Keyed, spanned, spread
from lmrepair.methods.targeting import share_of

if TYPE_CHECKING:
    from lmrepair.methods.maths import Apply
    from lmrepair.model import Delta, Net


@dataclass(frozen=True, kw_only=True)
class Spanning(Keyed):
    """Values that are reached over several layers, lowest first."""

    span: str = setting("1/4", "share of the layers to spread the change over, ending at depth: 1/4, 1/2, …")

    def __post_init__(self) -> None:
        super().__post_init__()
        share_of(self.span, "span")

    def layers_of(self, net: Net) -> list[int]:
        return spanned(net, self.depth, self.span)


@dataclass(frozen=True, kw_only=True)
class Memit(Spanning):
    """Values in the least-squares sense, weighed against what reference text keeps: M = (λC)⁻¹, ε = 1."""

    name: ClassVar[str] = "memit"

    weight: float = setting(0.1, "λ, the weight of reference text, in units of a layer's width", positive=True)

    def metrics(self, problem: Problem) -> dict[int, Apply]:
        from lmrepair.methods.maths import inverse_metric

        inputs, widths = metric_of(problem).inputs, problem.net.widths
        return {
            layer: inverse_metric(inputs[layer], 1.0 / (self.weight * widths[layer])) for layer in problem.sites.layers
        }

    def changes(self, problem: Problem, metrics: Mapping[int, Apply]) -> dict[int, Delta]:
        return spread(self, problem, metrics, lambda _: 1.0)


@dataclass(frozen=True, kw_only=True)
class AlphaEdit(Spanning):
    """MEMIT's values by changes within the sampled null space: they do nothing on the sampled reference text."""

    name: ClassVar[str] = "alphaedit"
    fine: ClassVar[bool] = True  # it is to do nothing on the sampled text

    inputs: str = setting("sampled", "how the coefficients' second moment is kept", ("auto", "full", "sampled"))
    threshold: float = setting(
        0.02, "second moment above which a direction is not in the null space, in units of the mean", positive=True
    )
    ridge: float = setting(0.1, "slack of the solve, as a share of its system's mean diagonal", positive=True)

    def metrics(self, problem: Problem) -> dict[int, Apply]:
        from lmrepair.methods.maths import null_space

        moments = metric_of(problem).statistics.inputs
        return {layer: null_space(moments[layer], self.threshold) for layer in problem.sites.layers}

    def changes(self, problem: Problem, metrics: Mapping[int, Apply]) -> dict[int, Delta]:
        return spread(self, problem, metrics, lambda scale: self.ridge * scale)
