"""What the steps of a minimum-KL solve share: margins with their gradients, among the directions allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lmrepair.methods.maths.dual import system_of
from lmrepair.methods.maths.margins import Factors
from lmrepair.methods.maths.spans import directions, shared_out
from lmrepair.model import Batch, Delta, Inverse, Metric, Preference, Product, Sites, grown, no_change

AIM, SPARE = 1.5, 0.1  # a step aims at AIM·margin + SPARE logits: a little beyond what is checked
CLOSE = 0.2  # share of the last rise below which what is missing is solved for without reading anew
PATIENCE = 4  # steps in which the open positions of a failure alone are all that is read anew
STAY = 0.5  # share of its margin that a position keeps that was right
# Share of the margin that a position which was right is to have, and a half of it at least: a logit at margin 3, twice
# bfloat16's step at 64, so that what was ahead by less is ahead in another dtype or engine too.
FIRM = 2 / 3


@dataclass(frozen=True)
class Used:
    """What a solved change uses of a layer: ``near`` z C⁻¹ [T, k], ``seen`` z C⁻¹ zᵀ [T, T], N ``mixed`` and
    N F⁻¹ ``white`` [T, d], as in ``spans.py``.
    """

    near: Tensor
    seen: Tensor
    mixed: Tensor
    white: Tensor


@dataclass(frozen=True)
class Linearised:
    """Margins [N] near a state of the model, and where it may be changed.

    ``columns``: layer → neurons of the sites [k]; ``places``: which of them are written to; ``inputs``: the
    metric there. ``spans``: layer → U [k, r], orthonormal under C, where a change is U X; without, it is any.
    ``parts``: layer → X [r, d] so far, on top of ``before``, what was there at the start; ``held``: U and X so far of
    spans that were not enough, until others are written to.
    Margins below ``floors`` are open, and steps take them to ``aims``. ``items``: the gradients of each
    failure that was read, as it was read last, z C⁻¹ and g; ``system`` [n, n] is their kernel, ``owed`` what their
    margins lose where what is held is cut to other spans, and ``short`` by how much the last step, number ``steps``,
    was to raise the margin that lacked most.
    """

    metric: Metric
    columns: Mapping[int, Tensor]
    places: Mapping[int, Tensor]
    inputs: Mapping[int, Inverse]
    spans: Mapping[int, Tensor] = field(default_factory=dict)
    parts: Mapping[int, Tensor] = field(default_factory=dict)
    before: Mapping[int, Delta] = field(default_factory=dict)
    held: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    aims: Tensor = field(default_factory=lambda: torch.zeros(0))
    floors: Tensor = field(default_factory=lambda: torch.zeros(0))
    items: tuple[Factors, ...] = ()
    system: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    owed: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    short: float = 0.0
    steps: int = 0

    @staticmethod
    def of(metric: Metric, columns: Mapping[int, Tensor], places: Mapping[int, Tensor] | None = None) -> Linearised:
        """Nothing read yet; ``places``: layer → indices into the sites' neurons (default: all)."""
        chosen = places or {layer: torch.arange(len(columns[layer])) for layer in columns}
        inverses = {layer: metric.restricted(layer, columns[layer].cpu()[chosen[layer]]) for layer in columns}
        return Linearised(metric, columns, chosen, inverses)

    def aimed(self, gap: Tensor, margin: float, asked: float) -> Linearised:
        """Mistakes are to rise a little beyond the margin; what was right is to stay as it was, up to that, or to
        become firm."""
        aim = AIM * margin + SPARE
        right = gap < -asked
        aims = (-gap).clamp(min=FIRM * margin, max=aim).where(right, aim)
        return replace(self, aims=aims, floors=(aims * STAY).where(right, margin).clamp(max=margin))

    @property
    def layers(self) -> tuple[int, ...]:
        """Those that are written to."""
        return tuple(sorted(self.spans or self.places))

    def among(self, sites: Sites) -> Sites:
        return Sites({layer: sites.columns[layer] for layer in self.layers})

    @property
    def rows(self) -> Tensor:
        """The positions whose margins are linearised, [n]."""
        return torch.cat([item.rows for item in self.items])

    def rise(self, gap: Tensor) -> Tensor:
        """By how much the linearised margins are to rise, [n]; negative where there is room."""
        return (self.aims + gap)[self.rows].double() + self.owed

    def raised_by(self, deltas: Mapping[int, Delta]) -> Tensor:
        """By how much the change so far (with spans: that in them) raises the linearised margins, [n]."""
        through = {layer: self._through(layer, deltas) for layer in self.layers}
        found = []
        for item in self.items:
            found.append(_raised(item, {layer: item.inputs[layer] @ there for layer, there in through.items()}))
        return torch.cat(found)

    def _through(self, layer: int, deltas: Mapping[int, Delta]) -> Tensor:
        """C Δ, in the spans X."""
        if self.spans:
            return self.parts[layer]
        places, delta = self.places[layer], deltas[layer]
        assert isinstance(delta, Tensor)
        return self.metric.through(layer, self.columns[layer].cpu()[places], delta[places])

    def open(self, batch: Batch, preference: Preference, part: slice) -> tuple[Tensor, Tensor]:
        """Which positions are open now, and of which gradients are read anew.

        That is: of failures with open positions, unless little is missing where it was read before (of all failures,
        where spans are chosen anew), all that are below their aims, so that none is lost again; of a failure alone,
        at first, the open ones.
        """
        opened = ~(preference.gap < -self.floors[part])
        near = ~(preference.gap < -self.aims[part])
        known = torch.zeros(len(self.floors), dtype=torch.bool, device=opened.device)
        if self.items:
            known[self.rows] = True
        missing = self.aims[part] + preference.gap
        stale = opened & ~(known[part] & (missing < CLOSE * self.short))
        # As what is held is cut, any margin may lose.
        failures = torch.full((len(batch.tokens),), bool(self.held), device=opened.device)
        failures[batch.owner[stale]] = True
        few = len(self.items) == 1 and self.steps <= PATIENCE
        return opened, (opened if few else near) & failures[batch.owner]

    def linearised(self, factors: Sequence[Factors]) -> Linearised:
        """With some failures read anew: their gradients take the place of the old ones, in the system too."""
        fresh = [self.restrict(item) for item in factors]
        near = [self._near(item) for item in fresh]
        again = {item.first for item in factors}
        kept = [item for item in self.items if item.first not in again]
        rows = system_of(kept, fresh, near, self._white)
        if not kept:
            return replace(self, items=tuple(near), system=rows, owed=self._owed(factors))
        stays = torch.cat(
            [torch.full_like(item.rows, item.first not in again, dtype=torch.bool) for item in self.items]
        )
        old = self.system[stays][:, stays]
        return replace(self, items=(*kept, *near), system=torch.cat([torch.cat([old, rows[:, : len(old)].T], 1), rows]))

    def _owed(self, factors: Sequence[Factors]) -> Tensor:
        """What each margin loses through ``cut``, [n]; 0 where nothing is cut."""
        if not self.cuts:
            return torch.zeros((), dtype=torch.float64)
        return -torch.cat(
            [_raised(item, {layer: self.cut(layer, item.inputs[layer]) for layer in self.held}) for item in factors]
        )

    @property
    def cuts(self) -> bool:
        """Whether the next step cuts what is held to spans that were chosen anew."""
        return bool(self.held and self.spans)

    def cut(self, layer: int, z: Tensor) -> Tensor:
        """How a layer's output moves at coefficients z [T, sites' k] as what is held is cut to the spans, [T, d]."""
        left, right = self.held[layer]
        kept = self.seen(layer, z) @ self.parts[layer] if layer in self.parts else 0.0
        return kept - self._placed(layer, z) @ left @ right

    def restrict(self, item: Factors) -> Factors:
        return replace(
            item,
            inputs={layer: self.seen(layer, item.inputs[layer]) for layer in self.layers},
            slopes={layer: item.slopes[layer] for layer in self.layers},
        )

    def _near(self, item: Factors) -> Factors:
        """z C⁻¹ for inputs; the slopes as they are, which are most of what is kept."""
        return replace(item, inputs={layer: self.near(layer, z) for layer, z in item.inputs.items()})

    def _white(self, layer: int, slopes: Tensor) -> Tensor:
        """g F⁻¹."""
        return self.metric.outputs[layer].apply(slopes)

    def seen(self, layer: int, z: Tensor) -> Tensor:
        """Coefficients [T, sites' k] as a change of this state sees them: [T, k], with spans z U [T, r]."""
        chosen = self._placed(layer, z)
        return chosen @ self.spans[layer] if self.spans else chosen

    def _placed(self, layer: int, z: Tensor) -> Tensor:
        """Of the neurons that are written to."""
        places = self.places[layer]
        return z if len(places) == z.shape[1] else z[:, places.to(z.device)]

    def near(self, layer: int, z: Tensor) -> Tensor:
        """The same times C⁻¹; in the spans C is the identity."""
        return z if self.spans else self.inputs[layer].apply(z)

    def changes(self, weights: Tensor) -> dict[int, Tensor]:
        """Layer → the change [k, d] (with spans [r, d]) that weights [n] of the linearised margins stand for."""
        found: dict[int, Tensor] = {}
        for layer in self.layers:
            white = self._white(layer, self._mixed(layer, weights))
            near = torch.cat([item.inputs[layer] for item in self.items])
            found[layer] = near.T @ white
        return found

    def used(self, factors: Sequence[Factors], weights: Tensor) -> dict[int, Used]:
        """What the change of ``weights`` uses; ``factors`` are the items as they were read."""
        found = {}
        for layer in self.layers:
            near = torch.cat([item.inputs[layer] for item in self.items])
            z = torch.cat([self.seen(layer, item.inputs[layer]) for item in factors])
            mixed = self._mixed(layer, weights)
            found[layer] = self.with_held(layer, z, Used(near, z @ near.T, mixed, self._white(layer, mixed)))
        return found

    def with_held(self, layer: int, z: Tensor, used: Used) -> Used:
        """What is used at coefficients z [T, k], and before it a row for each direction of what is held."""
        if layer not in self.held:
            return used
        left, right = self.held[layer]
        across, own = z @ left, torch.eye(left.shape[1]).to(left)  # held directions are orthonormal under C
        seen = torch.cat([torch.cat([own, across.T], dim=1), torch.cat([across, used.seen], dim=1)])
        mixed = self.metric.statistics.outputs[layer].damped(right, self.metric.damping)
        return Used(
            torch.cat([left.T, used.near]), seen, torch.cat([mixed, used.mixed]), torch.cat([right, used.white])
        )

    def _mixed(self, layer: int, weights: Tensor) -> Tensor:
        """Slopes of all items' positions [T, d], summed with the weights of their margins."""
        shares = weights.split([len(item.rows) for item in self.items])
        mixes = [
            torch.einsum("s,std->td", share, item.slopes[layer]) for share, item in zip(shares, self.items, strict=True)
        ]
        return torch.cat(mixes)

    def spanned(self, used: Mapping[int, Used], rank: int, room: int) -> Linearised:
        """Among the directions worth most alone, at most ``rank`` a layer and ``room`` numbers of factors in all.

        What is held is among them, as far as it is worth it. What was linearised has to be linearised again.
        """
        found = {layer: directions(item.seen, item.mixed, item.white) for layer, item in used.items()}
        sizes = {layer: item.near.shape[1] + item.white.shape[1] for layer, item in used.items()}
        counts = shared_out({layer: worth for layer, (worth, _) in found.items()}, sizes, rank, room)
        mixes = {layer: found[layer][1][:, :count] for layer, count in counts.items()}
        spans = {layer: (used[layer].near.T.double() @ mix).float() for layer, mix in mixes.items()}
        parts = {}
        for layer in spans.keys() & self.held.keys():
            _, right = self.held[layer]
            parts[layer] = (mixes[layer].T @ used[layer].seen[:, : len(right)].double() @ right.double()).float()
        return replace(self, items=(), spans=spans, parts=parts)

    def resumed(self) -> Linearised:
        """Among the directions of factors that are there already, if there are any."""
        spans: dict[int, Tensor] = {}
        parts: dict[int, Tensor] = {}
        before = dict(self.before)
        for layer, delta in self.before.items():
            if isinstance(delta, Product) and delta.rank:
                left, right = delta.factors()
                moment = self.metric.statistics.inputs[layer].at(self.columns[layer])
                sizes = (moment.damped(left, self.metric.damping) * left).sum(dim=1, keepdim=True).sqrt()
                spans[layer], parts[layer] = (left / sizes).T, sizes * right.T
                before[layer] = no_change(left.shape[1], len(right), left.device)
        return replace(self, spans=spans, parts=parts, before=before)

    def released(self) -> Linearised:
        """With the change so far held, and any direction open again."""
        if not self.spans:
            return self
        held = {layer: (self.spans[layer], part) for layer, part in self.parts.items()}
        system = torch.zeros(0, 0, dtype=torch.float64)
        return replace(self, spans={}, parts={}, held=held, items=(), system=system)

    def moved(self, changes: Mapping[int, Tensor], keep: float) -> Linearised:
        """With a change in the spans added to ``keep`` of that so far."""
        parts = {
            layer: keep * self.parts[layer] + change if layer in self.parts else change
            for layer, change in changes.items()
        }
        return replace(self, parts=parts, held={}, owed=torch.zeros((), dtype=torch.float64))

    def deltas(self) -> dict[int, Delta]:
        """Layer → the whole change; layers without a span have what they had at the start."""
        found = dict(self.before)
        for layer, part in self.parts.items():
            found[layer] = grown(found[layer], Product.of(self.spans[layer].T, part))
        return found


def _raised(item: Factors, moved: Mapping[int, Tensor]) -> Tensor:
    """By how much a failure's margins rise [s] where outputs move, layer → [T, d], in float64."""
    raised = [torch.einsum("std,td->s", item.slopes[layer], by) for layer, by in moved.items()]
    return torch.stack(raised).double().sum(dim=0)
