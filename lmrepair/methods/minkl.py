"""minkl: of all changes that close every mistake by a margin, the one that changes predictions least.

The maths: docs/methods.md. The cost of a change is the KL on reference text, to second order, with the
Kronecker-factored Fisher of arXiv 1503.05671.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from lmrepair.errors import UsageError
from lmrepair.methods.base import Asked, Problem, Step, Targeted, setting

if TYPE_CHECKING:
    from torch import Tensor

    from lmrepair.margins import Factors, Margins
    from lmrepair.moments import Inverse
    from lmrepair.net import Batch, Net, Sites

AIM, SPARE = 1.25, 0.1  # a step aims at AIM·margin + SPARE logits: a little beyond what is checked
RIDGE = 1e-3  # of the mean diagonal of the system
LEAST = 1e-12  # taken for that mean where no neuron that may change has any effect
MOMENTS = ("auto", "full", "sampled", "diagonal", "none")
EXCHANGES = 10  # of whole sets of constraints, before they go one by one


@dataclass(frozen=True, kw_only=True)
class MinKl(Targeted):
    """The smallest change of behaviour that repairs.

    Each step linearises the open margins exactly (one graph, a right-hand side for each), and solves
    for the deltas of least expected KL on reference text that close them; positions that become wrong
    enter the next step.
    """

    name: ClassVar[str] = "minkl"

    epochs: int = setting(20, "most steps for one problem", positive=True)
    margin: float = setting(1.0, "by how many logits a position must be preferred to count as done")
    inputs: str = setting("auto", "how the coefficients' second moment is kept", MOMENTS)
    outputs: str = setting("auto", "how the Fisher of the FFN outputs is kept", MOMENTS)
    samples: int = setting(2048, "reference positions that sampled moments keep", positive=True)
    damping: float = setting(0.01, "added to the moments, as a share of their mean diagonal", positive=True)
    neurons: int = setting(0, "most neurons a layer to write to, those that carry most of the repair; 0: no limit")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neurons < 0:
            raise UsageError(f"neurons is {self.neurons}; expected 0 (no limit) or more")

    def asks(self) -> Asked:
        return Asked(self.inputs, self.outputs, self.samples, self.damping)

    def read(
        self, net: Net, batches: Sequence[Batch], sites: Sites, focus: Tensor | None, margin: float | None
    ) -> Margins:
        from lmrepair.margins import read_margins

        return read_margins(net, batches, sites, focus, margin)

    def solve(self, problem: Problem) -> Step:
        state = problem.memory if problem.step else _State.of(problem)
        changes = self._changes(problem, state)
        if self.neurons and not problem.step:
            state = _State.of(problem, {layer: _top(change, self.neurons) for layer, change in changes.items()})
            changes = self._changes(problem, state)
        deltas = {
            layer: delta.index_add(0, state.places[layer].to(delta.device), changes[layer])
            for layer, delta in problem.deltas.items()
        }
        return Step(deltas, state)

    def _changes(self, problem: Problem, state: _State) -> dict[int, Tensor]:
        """Layer → change [k, d]."""
        import torch

        factors: tuple[Factors, ...] = problem.reading.factors  # type: ignore[attr-defined]
        whitened = [state.whiten(item) for item in factors]
        system = kernel([state.restrict(item) for item in factors], whitened)
        rows = torch.cat([item.rows for item in factors])
        rise = AIM * self.margin + SPARE + problem.reading.preference.gap[rows].double()
        mean = system.diagonal().mean().clamp(min=LEAST)
        ridge = RIDGE * mean * torch.eye(len(system), dtype=system.dtype, device=system.device)
        weights = not_negative(system + ridge, rise).split([len(item.rows) for item in factors])
        changes: dict[int, Tensor] = {}
        for layer in problem.sites.layers:
            for weight, item in zip(weights, whitened, strict=True):
                mixed = torch.einsum("s,std->td", weight.float(), item.slopes[layer])
                part = item.inputs[layer].T @ mixed
                changes[layer] = changes[layer] + part if layer in changes else part
        return changes


@dataclass(frozen=True)
class _State:
    """What the steps of one problem share: which of the sites' neurons are written to, and the metric there."""

    places: Mapping[int, Tensor]
    inputs: Mapping[int, Inverse]
    outputs: Mapping[int, Inverse]

    @staticmethod
    def of(problem: Problem, places: Mapping[int, Tensor] | None = None) -> _State:
        import torch

        metric, columns = problem.metric, problem.sites.columns
        if metric is None:
            raise UsageError("minkl needs statistics of reference text; repair() gathers them")
        chosen = places or {layer: torch.arange(len(columns[layer])) for layer in columns}
        inverses = {layer: metric.restricted(layer, columns[layer].cpu()[chosen[layer]]) for layer in columns}
        return _State(chosen, inverses, metric.outputs)

    def restrict(self, item: Factors) -> Factors:
        inputs = {
            layer: z if len(self.places[layer]) == z.shape[1] else z[:, self.places[layer].to(z.device)]
            for layer, z in item.inputs.items()
        }
        return replace(item, inputs=inputs)

    def whiten(self, item: Factors) -> Factors:
        """z C⁻¹ and g F⁻¹."""
        kept = self.restrict(item)
        return replace(
            item,
            inputs={layer: self.inputs[layer].apply(z) for layer, z in kept.inputs.items()},
            slopes={layer: self.outputs[layer].apply(g) for layer, g in kept.slopes.items()},
        )


def kernel(plain: Sequence[Factors], whitened: Sequence[Factors]) -> Tensor:
    """K [N, N]: K_st = Σ_layers Σ_ij (g_si F⁻¹ g_tj) (z_i C⁻¹ z_j), in float64, failure by failure.

    That is how far one unit of weight on position t moves the margin of position s.
    """
    import torch

    blocks = []
    for right in whitened:
        column = []
        for left in plain:
            block: Any = 0
            for layer, z in left.inputs.items():
                near = z @ right.inputs[layer].T
                carried = torch.einsum("ij,tjd->tid", near, right.slopes[layer])
                block = block + left.slopes[layer].flatten(1) @ carried.flatten(1).T
            column.append(block.double())
        blocks.append(torch.cat(column))
    system = torch.cat(blocks, dim=1)
    return (system + system.T) / 2


def not_negative(system: Tensor, wanted: Tensor) -> Tensor:
    """The weights λ ≥ 0 [N] of least λᵀAλ/2 − λᵀb: constraints that hold by themselves get none.

    Block exchanges of the set of active constraints, then single ones by least index, which cannot
    cycle for a positive definite A.
    """
    import torch

    count = len(wanted)
    active = torch.ones(count, dtype=torch.bool, device=wanted.device)
    slack = 1e-10 * wanted.abs().max().clamp(min=1e-300)
    for turn in range(EXCHANGES + 3 * count):
        weights = torch.zeros_like(wanted)
        chosen = active.nonzero().squeeze(1)
        if len(chosen):
            weights[chosen] = torch.linalg.solve(system[chosen][:, chosen], wanted[chosen])
        wrong = (active & (weights < 0)) | (~active & (wanted - system @ weights > slack))
        if not bool(wrong.any()):
            return weights
        if turn >= EXCHANGES:
            wrong = torch.arange(count, device=wrong.device) == int(wrong.nonzero()[0])
        active = active ^ wrong
    return weights.clamp(min=0)


def _top(change: Tensor, count: int) -> Tensor:
    best: Tensor = change.norm(dim=1).argsort(descending=True, stable=True)[:count].sort().values
    return best.cpu()
