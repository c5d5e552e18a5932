"""minkl: of all changes that close every mistake by a margin, the one that changes predictions least.

The maths: docs/methods.md. The cost of a change is the KL on reference text, to second order, with the
Kronecker-factored Fisher of arXiv 1503.05671.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from lmrepair.errors import UsageError
from lmrepair.methods.base import MOMENTS, Problem, Step, Targeted, metric_of, setting

if TYPE_CHECKING:
    from torch import Tensor

    from lmrepair.failures import Tokens
    from lmrepair.methods.maths import Factors, Margins, Tail
    from lmrepair.model import Asked, Batch, Inverse, Net, Preference, Sites

    _Leaning = tuple[Preference, Tensor]  # what is preferred, and the margins' slopes

AIM, SPARE = 1.5, 0.1  # a step aims at AIM·margin + SPARE logits: a little beyond what is checked
CLOSE = 0.2  # share of the last rise below which what is missing is solved for without reading anew
PATIENCE = 4  # steps in which the open positions of a failure alone are all that is read anew
KEEP, KEPT = 0.8, 5  # of several failures: share of the change so far that the first steps keep, and how many do
STAY = 0.5  # share of its margin that a position keeps that was right


@dataclass(frozen=True, kw_only=True)
class MinKl(Targeted):
    """The smallest change of behaviour that repairs.

    Each step linearises the open margins exactly (one graph, a right-hand side for each), and solves
    for the deltas of least expected KL on reference text that close them; positions that become wrong
    enter the next step.
    """

    name: ClassVar[str] = "minkl"

    epochs: int = setting(20, "most steps for one problem", positive=True)
    margin: float = setting(3.0, "by how many logits a position must be preferred to count as done")
    inputs: str = setting("auto", "how the coefficients' second moment is kept", MOMENTS)
    outputs: str = setting("auto", "how the Fisher of the FFN outputs is kept", MOMENTS)
    samples: int = setting(2048, "reference positions that sampled moments keep", positive=True)
    damping: float = setting(0.01, "added to the moments, as a share of their mean diagonal", positive=True)
    neurons: int = setting(0, "most neurons a layer to write to, those that move most; 0: no limit")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neurons < 0:
            raise UsageError(f"neurons is {self.neurons}; expected 0 (no limit) or more")

    def asks(self) -> Asked:
        from lmrepair.model import Asked

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
        from lmrepair.methods.maths import read_margins

        if margin is None or memory is None:
            return read_margins(net, batches, sites, focus, margin, self._first if margin is not None else None)
        return read_margins(net, batches, sites, focus, margin, memory.open)

    def _first(self, _: Batch, preference: Preference, __: slice) -> tuple[Tensor, Tensor]:
        """Mistakes are open; positions preferred by less than the margin are read with them, to keep what they have."""
        return ~(preference.gap < -self._asked), ~(preference.gap < -self.margin)

    @property
    def _asked(self) -> float:
        """The margin below which a position is asked for more. Solved in turn, all need slack for what comes later."""
        return 0.0 if self.mode == "multi-failure" else self.margin

    def memory(self, net: Net, tokens: Sequence[Tokens], sites: Sites) -> int:
        """With every target position open: the factors as read, whitened, and whitened a step before; four K."""
        wide = sum(len(columns) for columns in sites.columns.values())
        slopes = len(sites.columns) * net.hidden
        each = [len(item.ids) * (wide + len(item.target) * slopes) for item in tokens] or [0]
        rows = [len(item.target) for item in tokens] or [0]
        joint = self.mode == "multi-failure"
        return 12 * (sum(each) if joint else max(each)) + 32 * (sum(rows) if joint else max(rows)) ** 2

    def solve(self, problem: Problem) -> Step:
        state: _State = problem.memory if problem.step else _State.of(problem).aimed(problem, self.margin, self._asked)
        reading: Margins = problem.reading  # type: ignore[assignment]
        start = _agreed(reading)
        if reading.tail is not None and start is not None:
            return self._last_layer(problem, state, reading.tail, start)
        if reading.factors:
            state = state.linearised(reading.factors)
        keep = KEEP if 0 < problem.step <= KEPT and reading.factors and len(state.items) > 1 else 1.0
        changes = self._changes(problem, state, keep)
        if self.neurons and not problem.step:
            chosen = {layer: _top(change, self.neurons) for layer, change in changes.items()}
            state = _State.of(problem, chosen).aimed(problem, self.margin, self._asked).linearised(reading.factors)
            changes = self._changes(problem, state, keep)
        deltas = {
            layer: (delta if keep == 1 else keep * delta).index_add(
                0, state.places[layer].to(delta.device), changes[layer]
            )
            for layer, delta in problem.deltas.items()
        }
        return Step(deltas, replace(state, short=float(state.rise(problem).max()), steps=state.steps + 1))

    def _last_layer(self, problem: Problem, state: _State, tail: Tail, start: _Leaning) -> Step:
        """All steps at once for the last layer, without running the model."""
        (layer,) = problem.sites.layers
        before = problem.deltas[layer]
        change = self._through_tail(problem, state, tail, start)
        if self.neurons and not problem.step:
            state = _State.of(problem, {layer: _top(change, self.neurons)}).aimed(problem, self.margin, self._asked)
            change = self._through_tail(problem, state, tail, start)
        return Step({layer: before.index_add(0, state.places[layer].to(change.device), change)}, state)

    def _through_tail(self, problem: Problem, state: _State, tail: Tail, start: _Leaning) -> Tensor:
        """The change [k, d] of the neurons that leaves no margin open, from what is read without it."""
        import torch

        from lmrepair.methods.maths import weights_for

        (layer,) = problem.sites.layers
        z = tail.inputs[:, state.places[layer].to(tail.inputs.device)]
        near = state.inputs[layer].apply(z)
        change = torch.zeros(z.shape[1], tail.states.shape[1], device=z.device)
        for step in range(self.epochs):
            preference, slopes = tail.read(z @ change) if step else start
            missing = (state.aims + preference.gap).double()
            if not bool((problem.focus & ~(preference.gap < -state.floors)).any()):
                break
            rows = (problem.focus & (missing > 0)).nonzero().squeeze(1)
            across = state.outputs[layer].apply(slopes[rows])
            system = ((z[rows] @ near[rows].T) * (slopes[rows] @ across.T)).double()
            weights = weights_for((system + system.T) / 2, missing[rows])
            change = change + near[rows].T @ (weights[:, None] * across)
        return change

    def _changes(self, problem: Problem, state: _State, keep: float) -> dict[int, Tensor]:
        """Layer → what is to be added [k, d] to ``keep`` of the change so far."""
        import torch

        from lmrepair.methods.maths import weights_for

        rise = state.rise(problem)
        if keep < 1:
            rise = rise + (1 - keep) * state.raised_by(problem)
        weights = weights_for(state.system, rise)
        changes: dict[int, Tensor] = {}
        for layer in problem.sites.layers:
            for weight, item in zip(weights.split([len(item.rows) for item in state.items]), state.items, strict=True):
                mixed = torch.einsum("s,std->td", weight, item.slopes[layer])
                part = item.inputs[layer].T @ mixed
                changes[layer] = changes[layer] + part if layer in changes else part
        return changes


@dataclass(frozen=True)
class _State:
    """What the steps of one problem share.

    ``places``: layer → which of the sites' neurons are written to; ``inputs``, ``outputs``: the metric there.
    Margins [N]: those below ``floors`` are open, and steps take them to ``aims``. ``items``: the whitened
    gradients of each failure that was read, as it was read last; ``system`` [n, n] is their kernel, and
    ``short`` by how much the last step, number ``steps``, was to raise the margin that lacked most.
    """

    places: Mapping[int, Tensor]
    inputs: Mapping[int, Inverse]
    outputs: Mapping[int, Inverse]
    aims: Any = None
    floors: Any = None
    items: tuple[Factors, ...] = ()
    system: Any = None
    short: float = 0.0
    steps: int = 0

    @staticmethod
    def of(problem: Problem, places: Mapping[int, Tensor] | None = None) -> _State:
        import torch

        metric, columns = metric_of(problem), problem.sites.columns
        chosen = places or {layer: torch.arange(len(columns[layer])) for layer in columns}
        inverses = {layer: metric.restricted(layer, columns[layer].cpu()[chosen[layer]]) for layer in columns}
        return _State(chosen, inverses, metric.outputs)

    def aimed(self, problem: Problem, margin: float, asked: float) -> _State:
        """Mistakes are to rise a little beyond the margin; what was right is to stay as it was, up to that."""
        gap = problem.reading.preference.gap
        aim = AIM * margin + SPARE
        right = gap < -asked
        aims = (-gap).clamp(max=aim).where(right, aim)
        return replace(self, aims=aims, floors=(aims * STAY).where(right, margin).clamp(max=margin))

    @property
    def rows(self) -> Tensor:
        """The positions whose margins are linearised, [n]."""
        import torch

        return torch.cat([item.rows for item in self.items])

    def rise(self, problem: Problem) -> Tensor:
        """By how much the linearised margins are to rise, [n]; negative where there is room."""
        missing: Tensor = self.aims + problem.reading.preference.gap
        return missing[self.rows].double()

    def raised_by(self, problem: Problem) -> Tensor:
        """By how much the change so far raises the linearised margins, [n]."""
        import torch

        metric, found = metric_of(problem), []
        through = {
            layer: metric.through(layer, problem.sites.columns[layer].cpu()[places], problem.deltas[layer][places])
            for layer, places in self.places.items()
        }
        for item in self.items:
            parts = [
                torch.einsum("std,td->s", g, item.inputs[layer] @ through[layer]) for layer, g in item.slopes.items()
            ]
            found.append(torch.stack(parts).double().sum(dim=0))
        return torch.cat(found)

    def open(self, batch: Batch, preference: Preference, part: slice) -> tuple[Tensor, Tensor]:
        """Which positions are open now, and of which gradients are read anew.

        That is: of failures with open positions, unless little is missing where it was read before, all
        that are below their aims, so that none is lost again; of a failure alone, at first, the open ones.
        """
        import torch

        opened = ~(preference.gap < -self.floors[part])
        near = ~(preference.gap < -self.aims[part])
        known = torch.zeros(len(self.floors), dtype=torch.bool, device=opened.device)
        if self.items:
            known[self.rows] = True
        missing = self.aims[part] + preference.gap
        stale = opened & ~(known[part] & (missing < CLOSE * self.short))
        failures = torch.zeros(len(batch.tokens), dtype=torch.bool, device=opened.device)
        failures[batch.owner[stale]] = True
        few = len(self.items) == 1 and self.steps <= PATIENCE
        return opened, (opened if few else near) & failures[batch.owner]

    def linearised(self, factors: Sequence[Factors]) -> _State:
        """With some failures read anew: their gradients take the place of the old ones, in the system too."""
        import torch

        from lmrepair.methods.maths import gram, kernel

        fresh = [self.restrict(item) for item in factors]
        white = [self.whiten(item) for item in fresh]
        again = {item.first for item in factors}
        kept = [item for item in self.items if item.first not in again]
        corner = gram(fresh, white)
        if not kept:
            return replace(self, items=tuple(white), system=corner)
        side = kernel(kept, fresh)
        stays = torch.cat(
            [torch.full_like(item.rows, item.first not in again, dtype=torch.bool) for item in self.items]
        )
        old = self.system[stays][:, stays]
        return replace(
            self, items=(*kept, *white), system=torch.cat([torch.cat([old, side], 1), torch.cat([side.T, corner], 1)])
        )

    def restrict(self, item: Factors) -> Factors:
        inputs = {
            layer: z if len(self.places[layer]) == z.shape[1] else z[:, self.places[layer].to(z.device)]
            for layer, z in item.inputs.items()
        }
        return replace(item, inputs=inputs)

    def whiten(self, item: Factors) -> Factors:
        """z C⁻¹ and g F⁻¹."""
        return replace(
            item,
            inputs={layer: self.inputs[layer].apply(z) for layer, z in item.inputs.items()},
            slopes={layer: self.outputs[layer].apply(g) for layer, g in item.slopes.items()},
        )


def _agreed(reading: Margins) -> _Leaning | None:
    """What the tail reads, where the last layer alone is written to and only the final norm and the head follow."""
    import torch

    if reading.tail is None or not reading.factors:
        return None
    slopes = torch.cat([next(iter(item.slopes.values())).sum(dim=1) for item in reading.factors])
    rows = torch.cat([item.rows for item in reading.factors])
    return reading.tail.agreed(reading.preference, rows, slopes)


def _top(change: Tensor, count: int) -> Tensor:
    best: Tensor = change.norm(dim=1).argsort(descending=True, stable=True)[:count].sort().values
    return best.cpu()
