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
    from lmrepair.net import Batch, Net, Preference, Sites

AIM, SPARE = 1.5, 0.1  # a step aims at AIM·margin + SPARE logits: a little beyond what is checked
CLOSE = 0.2  # share of the last rise below which what is missing is solved for without reading anew
STAY = 0.5  # share of its margin that a position keeps that was right
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
        self,
        net: Net,
        batches: Sequence[Batch],
        sites: Sites,
        focus: Tensor | None,
        margin: float | None,
        memory: _State | None = None,
    ) -> Margins:
        from lmrepair.margins import read_margins

        if margin is None or memory is None:
            return read_margins(net, batches, sites, focus, margin, self._first if margin is not None else None)
        alone = len(batches) == 1
        return read_margins(net, batches, sites, focus, margin, lambda now, part: memory.open(now, part, alone))

    def _first(self, preference: Preference, _: slice) -> tuple[Tensor, Tensor]:
        """Mistakes are open; positions preferred by less than the margin are read with them, to keep what they have."""
        return ~(preference.gap < 0), ~(preference.gap < -self.margin)

    def solve(self, problem: Problem) -> Step:
        state: _State = problem.memory if problem.step else _State.of(problem).aimed(problem, self.margin)
        reading: Margins = problem.reading  # type: ignore[assignment]
        if reading.factors:
            state = state.linearised(reading.factors)
        changes = self._changes(problem, state)
        if self.neurons and not problem.step:
            chosen = {layer: _top(change, self.neurons) for layer, change in changes.items()}
            state = replace(_State.of(problem, chosen), aims=state.aims, floors=state.floors)
            state = state.linearised(reading.factors)
            changes = self._changes(problem, state)
        deltas = {
            layer: delta.index_add(0, state.places[layer].to(delta.device), changes[layer])
            for layer, delta in problem.deltas.items()
        }
        return Step(deltas, replace(state, short=float(state.rise(problem).max())))

    def _changes(self, problem: Problem, state: _State) -> dict[int, Tensor]:
        """Layer → change [k, d]."""
        import torch

        weights = not_negative(state.system, state.rise(problem))
        changes: dict[int, Tensor] = {}
        for layer in problem.sites.layers:
            for weight, item in zip(
                weights.split([len(item.rows) for item in state.whitened]), state.whitened, strict=True
            ):
                mixed = torch.einsum("s,std->td", weight.float(), item.slopes[layer])
                part = item.inputs[layer].T @ mixed
                changes[layer] = changes[layer] + part if layer in changes else part
        return changes


@dataclass(frozen=True)
class _State:
    """What the steps of one problem share.

    ``places``: layer → which of the sites' neurons are written to; ``inputs``, ``outputs``: the metric there.
    Margins [N]: those below ``floors`` are open, and steps take them to ``aims``. Of the last
    linearisation: ``whitened`` factors, ``system`` [n, n], and ``short``, by how much it was to raise the
    margin that lacked most.
    """

    places: Mapping[int, Tensor]
    inputs: Mapping[int, Inverse]
    outputs: Mapping[int, Inverse]
    aims: Any = None
    floors: Any = None
    whitened: tuple[Factors, ...] = ()
    system: Any = None
    short: float = 0.0

    def aimed(self, problem: Problem, margin: float) -> _State:
        """Mistakes are to rise a little beyond the margin; what was right is to stay as it was, up to that."""
        gap = problem.reading.preference.gap
        aim = AIM * margin + SPARE
        aims = (-gap).clamp(max=aim).where(gap < 0, aim)
        return replace(self, aims=aims, floors=(aims * STAY).where(gap < 0, margin).clamp(max=margin))

    def rise(self, problem: Problem) -> Tensor:
        """By how much the linearised margins are to rise, [n]; negative where there is room."""
        missing: Tensor = self.aims + problem.reading.preference.gap
        return missing[self.rows].double()

    def open(self, preference: Preference, part: slice, alone: bool) -> tuple[Tensor, Tensor]:
        """Which positions are open now, and of which gradients are read: none where the old ones still serve."""
        opened = ~(preference.gap < -self.floors[part])
        read = ~(preference.gap < -self.aims[part])
        if alone and bool(opened.any()):
            known = set(self.rows.tolist())
            small = bool((self.aims + preference.gap)[opened].max() < CLOSE * self.short)
            if small and known.issuperset(opened.nonzero().squeeze(1).tolist()):
                return opened, opened & False
        return opened, read

    @property
    def rows(self) -> Tensor:
        """The positions whose margins are linearised, [n]."""
        import torch

        return torch.cat([item.rows for item in self.whitened])

    def linearised(self, factors: Sequence[Factors]) -> _State:
        """The system of these margins: what is solved until they are read again."""
        import torch

        whitened = tuple(self.whiten(item) for item in factors)
        system = kernel([self.restrict(item) for item in factors], whitened)
        mean = system.diagonal().mean().clamp(min=LEAST)
        ridge = RIDGE * mean * torch.eye(len(system), dtype=system.dtype, device=system.device)
        return replace(self, whitened=whitened, system=system + ridge)

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
