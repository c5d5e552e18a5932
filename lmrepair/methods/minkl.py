"""minkl: of all changes that close every mistake by a margin, the one that changes predictions least.

The maths: docs/methods.md. The cost of a change is the KL on reference text, to second order, with the
Kronecker-factored Fisher of arXiv 1503.05671.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

from lmrepair.errors import UsageError
from lmrepair.methods.base import LAYERS, MOMENTS, Problem, Step, Targeted, metric_of, setting

if TYPE_CHECKING:
    from torch import Tensor

    from lmrepair.failures import Tokens
    from lmrepair.methods.maths import Factors, Linearised, Margins, Tail, Used
    from lmrepair.model import Asked, Batch, Delta, Net, Preference, Sites

    _Start = tuple[Tail, Preference, Tensor]  # the tail, what is preferred, and the margins' slopes

ALONE, LEAST = Fraction(1, 2), 12  # of the layers, but so many: those, from above, that one failure is written to
KEEP, KEPT = 0.8, 5  # of several failures: share of the change so far that the first steps keep, and how many do
ANEW = 6  # steps after which directions that have not been enough are chosen anew
SHARED = 0.004  # of the model's bytes: most that the factors for one failure take; for n, √n times as much


@dataclass(frozen=True, kw_only=True)
class MinKl(Targeted):
    """The smallest change of behaviour that repairs.

    Each step linearises the open margins exactly (one graph, a right-hand side for each), and solves
    for the deltas of least expected KL on reference text that close them; positions that become wrong
    enter the next step. The first solve says which directions of which layers are worth most; it is made
    again for those alone, and all later steps stay among them.
    """

    name: ClassVar[str] = "minkl"
    advice: ClassVar[str] = "try more epochs, a larger rank (0: no limit), or repair it --alone"

    layers: str = setting("auto", LAYERS)
    epochs: int = setting(20, "most steps for one problem", positive=True)
    margin: float = setting(3.0, "by how many logits a position must be preferred to count as done")
    inputs: str = setting("auto", "how the coefficients' second moment is kept", MOMENTS)
    outputs: str = setting("auto", "how the Fisher of the FFN outputs is kept", MOMENTS)
    samples: int = setting(2048, "reference positions that sampled moments keep", positive=True)
    damping: float = setting(0.01, "added to the moments, as a share of their mean diagonal", positive=True)
    rank: int = setting(16, "most rank a layer of the change for one failure, √n times as much for n; 0: no limit")
    neurons: int = setting(0, "most neurons a layer to write to, those that move most; 0: no limit")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "neurons"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}; expected 0 (no limit) or more")

    def suited(self, net: Net, failures: int) -> MinKl:
        """One failure needs no more than the upper layers, which take half the time; several need the room."""
        if self.layers != "auto":
            return self
        upper = max(LEAST, math.ceil(ALONE * net.layers))
        alone = failures == 1 and upper < net.layers
        return replace(self, layers=f"upper {Fraction(upper, net.layers)}" if alone else "1")

    def asks(self) -> Asked:
        from lmrepair.model import Asked

        return Asked(self.inputs, self.outputs, self.samples, self.damping, weighted=True, kindred=True)

    def read(
        self,
        net: Net,
        batches: Sequence[Batch],
        sites: Sites,
        focus: Tensor | None,
        margin: float | None,
        memory: Linearised | None = None,
    ) -> Margins:
        from lmrepair.methods.maths import read_margins

        alone = sum(len(batch.tokens) for batch in batches) == 1
        sites = sites if memory is None else memory.among(sites)
        # The last layer's steps are made behind it, where the best rival is always the present one.
        rivals = alone and sites.layers != (net.layers - 1,)
        if margin is not None and memory is not None:
            return read_margins(net, batches, sites, focus, margin, memory.open, rivals)
        choose = None if margin is None else self._mistakes if rivals and not self._asked else self._first
        return read_margins(net, batches, sites, focus, margin, choose, rivals)

    @staticmethod
    def _mistakes(_: Batch, preference: Preference, __: slice) -> tuple[Tensor, Tensor]:
        """Of a failure alone, what is right is looked at again after the step."""
        wrong = ~(preference.gap < 0)
        return wrong, wrong

    def _first(self, _: Batch, preference: Preference, __: slice) -> tuple[Tensor, Tensor]:
        """Mistakes are open; positions preferred by less than the margin are read with them, to keep what they have."""
        return ~(preference.gap < -self._asked), ~(preference.gap < -self.margin)

    @property
    def _asked(self) -> float:
        """The margin below which a position is asked for more. Solved in turn, all need slack for what comes later."""
        return 0.0 if self.mode == "multi-failure" else self.margin

    def memory(self, net: Net, tokens: Sequence[Tokens], sites: Sites) -> int:
        """With every target position open: the factors as read, and as read a step before; four K."""
        wide = sum(len(columns) for columns in sites.columns.values())
        slopes = len(sites.columns) * net.hidden
        each = [len(item.ids) * (wide + len(item.target) * slopes) for item in tokens] or [0]
        rows = [len(item.target) for item in tokens] or [0]
        joint = self.mode == "multi-failure"
        return 8 * (sum(each) if joint else max(each)) + 32 * (sum(rows) if joint else max(rows)) ** 2

    def solve(self, problem: Problem) -> Step:
        state: Linearised = problem.memory if problem.step else self._start(problem)
        reading: Margins = problem.reading  # type: ignore[assignment]
        start = _agreed(reading)
        if start is not None:
            return self._last_layer(problem, state, start)
        if reading.factors:
            state = state.linearised(reading.factors)
        keep = KEEP if 0 < state.steps <= KEPT and reading.factors and len(state.items) > 1 else 1.0
        weights = _weights(problem, state, keep)
        if not state.spans:
            chosen = self._chosen(problem, state, reading.factors, weights)
            if chosen is not None:
                state = chosen.linearised(reading.factors)
                weights = _weights(problem, state, keep)
        state, deltas = _moved(problem, state, state.changes(weights), keep)
        short = float(state.rise(reading.preference.gap).max())
        return Step(deltas, _after(replace(state, short=short)))

    def _start(self, problem: Problem) -> Linearised:
        from lmrepair.methods.maths import Linearised

        state = replace(Linearised.of(metric_of(problem), problem.sites.columns), before=problem.deltas)
        if self.rank and self.mode == "multi-failure":  # another solve of the same failures stays in its directions
            state = state.resumed()
        return self._aimed(problem, state)

    def _aimed(self, problem: Problem, state: Linearised) -> Linearised:
        return state.aimed(problem.reading.preference.gap, self.margin, self._asked)

    def _chosen(
        self, problem: Problem, state: Linearised, factors: Sequence[Factors], weights: Tensor
    ) -> Linearised | None:
        """Where the first solve is made again, with fewer neurons or directions; None: nowhere else."""
        if self.neurons:
            return None if state.steps else self._fewer(problem, state.changes(weights))
        rank, room = self._limits(problem, state)
        return state.spanned(state.used(factors, weights), rank, room) if rank else None

    def _fewer(self, problem: Problem, changes: Mapping[int, Tensor]) -> Linearised:
        """With the neurons that move most."""
        from lmrepair.methods.maths import Linearised

        places = {layer: _top(change, self.neurons) for layer, change in changes.items()}
        return self._aimed(problem, Linearised.of(metric_of(problem), problem.sites.columns, places))

    def _limits(self, problem: Problem, state: Linearised) -> tuple[int, int]:
        """Most rank a layer, and most numbers in the factors of all; no rank where factors would not be smaller."""
        net = problem.net
        # Where three choices of as many directions have not been enough, each later one has as much room again.
        share = math.sqrt(sum(len(batch.tokens) for batch in problem.batches)) * max(1, state.steps // ANEW - 1)
        rank = math.ceil(self.rank * share)
        whole = min(min(len(columns) for columns in problem.sites.columns.values()), net.hidden)
        # Solved in turn, what was solved before keeps its directions.
        held = max((getattr(delta, "rank", 0) for delta in state.before.values()), default=0)
        there = rank + held if self.mode == "batch" else rank
        return rank if there < whole / 2 else 0, int(SHARED * net.bytes / 2 * share)

    def _last_layer(self, problem: Problem, state: Linearised, start: _Start) -> Step:
        """All steps at once for the last layer, without running the model."""
        (layer,) = state.layers
        used = self._through_tail(problem, state, start)
        if not state.spans:
            rank, room = self._limits(problem, state)
            chosen = None
            if self.neurons:
                chosen = None if state.steps else self._fewer(problem, {layer: used.near.T @ used.white})
            elif rank and bool(used.white.any()):
                with_held = state.with_held(layer, state.seen(layer, start[0].inputs), used)
                chosen = state.spanned({layer: with_held}, rank, room)
            if chosen is not None:
                state, used = chosen, self._through_tail(problem, chosen, start)
        state, deltas = _moved(problem, state, {layer: used.near.T @ used.white}, 1.0)
        return Step(deltas, _after(state))

    def _through_tail(self, problem: Problem, state: Linearised, start: _Start) -> Used:
        """The change of the last layer that leaves no margin open, from what is read without it."""
        import torch

        from lmrepair.methods.maths import Used, weights_for

        tail, agreed, leaning = start
        (layer,) = state.layers
        z = state.seen(layer, tail.inputs)
        near = state.near(layer, z)
        seen = z @ near.T
        mixed = torch.zeros_like(tail.states, dtype=torch.float32)
        white = torch.zeros_like(mixed)
        cut = state.cut(layer, tail.inputs) if state.cuts else None
        for step in range(self.epochs):
            moved = seen @ white if cut is None else seen @ white + cut
            preference, slopes = tail.read(moved) if step or cut is not None else (agreed, leaning)
            missing = (state.aims + preference.gap).double()
            if not bool((problem.focus & ~(preference.gap < -state.floors)).any()):
                break
            rows = (problem.focus & (missing > 0)).nonzero().squeeze(1)
            across = state.metric.outputs[layer].apply(slopes[rows])
            system = (seen[rows][:, rows] * (slopes[rows] @ across.T)).double()
            weights = weights_for((system + system.T) / 2, missing[rows])[:, None]
            mixed, white = mixed.index_add(0, rows, weights * slopes[rows]), white.index_add(0, rows, weights * across)
        return Used(near, seen, mixed, white)


def _weights(problem: Problem, state: Linearised, keep: float) -> Tensor:
    """The weights [n] of what is to be added to ``keep`` of the change so far."""
    from lmrepair.methods.maths import weights_for

    rise = state.rise(problem.reading.preference.gap)
    if keep < 1:
        rise = rise + (1 - keep) * state.raised_by(problem.deltas)
    return weights_for(state.system, rise)


def _moved(
    problem: Problem, state: Linearised, changes: Mapping[int, Tensor], keep: float
) -> tuple[Linearised, dict[int, Delta]]:
    """The state after a step and layer → the whole change; layers that are not written to keep what they have."""
    from lmrepair.model import written_out

    if state.spans:
        state = state.moved(changes, keep)
        return state, {**problem.deltas, **state.deltas()}
    deltas = dict(problem.deltas)
    for layer in state.layers:
        so_far = written_out(deltas[layer])
        places = state.places[layer].to(so_far.device)
        deltas[layer] = (so_far if keep == 1 else keep * so_far).index_add(0, places, changes[layer])
    return state, deltas


def _after(state: Linearised) -> Linearised:
    """The state one step on; now and then any direction is open to it again."""
    state = replace(state, steps=state.steps + 1)
    return state if state.steps % ANEW else state.released()


def _agreed(reading: Margins) -> _Start | None:
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
