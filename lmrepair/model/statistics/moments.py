"""Second moments of what flows through a layer on reference text, and their damped inverses.

A moment M = E[x xᵀ] is kept full [w, w], as the blocks on its diagonal (one an expert), as n sampled rows [n, w],
or as its diagonal [w]. Its inverse is applied and never formed: a full one and blocks are factored, n sampled rows
need one n×n system (Woodbury's identity).

What damps a moment is a share of its mean diagonal, over all experts of a layer: one that few tokens were sent to
has little of its own beside it, and is taken for an average one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lmrepair.errors import UsageError
from lmrepair.failures import Failure, kindred

KINDS = ("full", "blocks", "sampled", "diagonal")
LONG, COARSE = 256, 0.05  # from which width on float32 is used, and up to which bound on the error it makes
TRIES = 8  # at a Cholesky factor, each with ten times the damping of the one before

Made = TypeVar("Made")


class OnDemand(Mapping[int, Made]):
    """Layer → what is made of it when it is asked for; made once with ``keep``, anew each time without."""

    def __init__(self, layers: Iterable[int], make: Callable[[int], Made], keep: bool = True) -> None:
        self._layers, self._make, self._keep = tuple(layers), make, keep
        self._made: dict[int, Made] = {}

    def __getitem__(self, layer: int) -> Made:
        if layer not in self._layers:
            raise KeyError(layer)
        if not self._keep:
            return self._make(layer)
        if layer not in self._made:
            self._made[layer] = self._make(layer)
        return self._made[layer]

    def known(self, layer: int) -> Made | None:
        """What was made of a layer already."""
        return self._made.get(layer)

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


@dataclass(frozen=True)
class Moment:
    """E[x xᵀ] of vectors of one width: ``values`` is [w, w] (full), x₁…xₙ [n, w] (sampled), or [w] (diagonal).

    Of "blocks" of several ``widths`` it is [h, w], h the widest: each block's columns, with its rows on top.
    """

    kind: str
    values: Tensor
    widths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        two = self.values.dim() == 2
        fits = {"full": two, "sampled": two, "blocks": two and sum(self.widths) == self.values.shape[-1]}
        if not fits.get(self.kind, self.kind == "diagonal" and self.values.dim() == 1):
            raise UsageError(f"a {self.kind!r} moment of shape {tuple(self.values.shape)}; known: {', '.join(KINDS)}")

    @property
    def diagonal(self) -> Tensor:
        """E[x²], [w]."""
        if self.kind == "full":
            return self.values.diagonal()
        if self.kind == "blocks":
            rows = torch.cat([torch.arange(width) for width in self.widths]).to(self.values.device)
            return self.values[rows, torch.arange(len(rows), device=rows.device)]
        return self.values.square().mean(dim=0) if self.kind == "sampled" else self.values

    def at(self, columns: Tensor) -> Moment:
        """The moment of some of the entries alone."""
        if len(columns) == self.values.shape[-1]:
            return self
        chosen = columns.to(self.values.device)
        if self.kind == "blocks":
            return self._blocks_at(chosen)
        values = self.values[..., chosen]
        return Moment(self.kind, values[chosen] if self.kind == "full" else values)

    def _blocks_at(self, columns: Tensor) -> Moment:
        parts = []
        for block in blocks(self.widths):
            inside = columns[(columns >= block.start) & (columns < block.stop)]
            parts.append(self.values[: block.stop - block.start, block][inside - block.start][:, inside - block.start])
        return Moment.of_blocks([part for part in parts if len(part)])

    @staticmethod
    def of_blocks(parts: Sequence[Tensor]) -> Moment:
        """From the blocks [wₑ, wₑ] on its diagonal."""
        widths = tuple(len(part) for part in parts)
        tallest = max(widths)
        padded = [F.pad(part, (0, 0, 0, tallest - len(part))) for part in parts]
        return Moment("blocks", torch.cat(padded, dim=1), widths)

    def apply(self, x: Tensor) -> Tensor:
        """x M, for rows x [n, w]."""
        values = self.values.to(x)
        if self.kind == "blocks":
            some = blocks(self.widths)
            return torch.cat([x[:, one] @ values[: one.stop - one.start, one] for one in some], dim=1)
        if self.kind == "full":
            return x @ values
        return (x @ values.T) @ values / len(values) if self.kind == "sampled" else x * values

    def damped(self, x: Tensor, damping: float) -> Tensor:
        """x (M + damping·mean(diag M)·I), what ``inverse`` takes back."""
        return self.apply(x) + _added(self, damping) * x

    def inverse(self, damping: float) -> Inverse:
        """(M + damping·mean(diag M)·I)⁻¹, factored in float64, or in float32 where that is fine enough."""
        added = _added(self, damping)
        if self.kind == "full":
            return Inverse("full", _factor(self.values.to(_precision(len(self.values), damping)), added).float())
        values = self.values.double()
        if self.kind == "diagonal":
            return Inverse("diagonal", (1.0 / (values + added)).float())
        if self.kind == "blocks":
            some = [values[: one.stop - one.start, one] for one in blocks(self.widths)]
            made = Moment.of_blocks([_factor(block, added).float() for block in some])
            return Inverse("blocks", made.values, widths=made.widths)
        # (a I + XᵀX/n)⁻¹ = (I − Xᵀ (n a I + X Xᵀ)⁻¹ X) / a = (I − BᵀB) / a with B = L⁻¹ X
        inner = values @ values.T + len(values) * added * torch.eye(
            len(values), dtype=torch.float64, device=values.device
        )
        rows = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), values, upper=False)
        return Inverse("sampled", rows.float(), 1.0 / added)

    @staticmethod
    def identity(width: int, scale: float = 1.0) -> Moment:
        """The moment that prefers no direction: scale·I."""
        return Moment("diagonal", torch.full((width,), scale))


def _precision(width: int, damping: float) -> torch.dtype:
    """What a damped moment is factored in: its condition is at most w / damping + 1, as none of its eigenvalues
    is above its trace."""
    bound = (width / damping + 1) * torch.finfo(torch.float32).eps
    return torch.float32 if width >= LONG and bound <= COARSE else torch.float64


def blocks(widths: Sequence[int]) -> list[slice]:
    """The columns of each block."""
    ends = [0, *accumulate(widths)]
    return [slice(start, end) for start, end in pairwise(ends)]


def _factor(values: Tensor, added: float) -> Tensor:
    """L [w, w] with L Lᵀ = M + added·I, by more than ``added`` where rounding keeps M from being positive."""
    factor: Tensor = values
    for attempt in range(TRIES):
        damped = values.clone()
        damped.diagonal().add_(added * 10**attempt)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            break
    return factor


def _added(moment: Moment, damping: float) -> float:
    scale = float(moment.diagonal.double().mean())
    return damping * scale if scale > 0 else 1.0


@dataclass(frozen=True)
class Asked:
    """The statistics of reference text that a method asks for.

    ``inputs`` and ``outputs``: how the moments of coefficients and of gradients are kept: "full", "sampled",
    "diagonal", "none" (no direction is preferred), or "auto", by width. ``samples``: how many rows are kept. Where
    no output's is kept and positions count alike, no gradient is read: a third of the time.
    ``damping`` is added to the moments before they are inverted, as a share of their mean diagonal. ``weighted``:
    each position counts in one moment by the square of its vector in the other, so that C ⊗ F is near E[zzᵀ ⊗ δδᵀ]
    where the two depend on each other: at a text's first position, on which attention rests, coefficients are
    small and gradients large. ``kindred``: other requests in the failures' own form are read too.
    """

    inputs: str
    outputs: str
    samples: int
    damping: float
    weighted: bool = False
    kindred: bool = False

    @property
    def slopes(self) -> bool:
        """Whether gradients are read."""
        return self.weighted or self.outputs != "none"

    def alike(self, failures: Sequence[Failure]) -> list[Failure] | None:
        """Other requests in the failures' form, where they are to be read."""
        return kindred(failures) if self.kindred else None


@dataclass(frozen=True)
class Inverse:
    """The inverse of a damped moment; ``apply`` multiplies rows by it. ``values``: of a full one, its factor L.

    Of blocks, those of their factors, as a moment keeps them.
    """

    kind: str
    values: Tensor
    scale: float = 1.0
    widths: tuple[int, ...] = ()

    def apply(self, x: Tensor) -> Tensor:
        """x M⁻¹, for x [..., w]."""
        values = self.values.to(x.device)
        if self.kind == "full":
            return _solved(values, x)
        if self.kind == "blocks":
            some = blocks(self.widths)
            return torch.cat([_solved(values[: one.stop - one.start, one], x[..., one]) for one in some], dim=-1)
        return self.scale * (x - (x @ values.T) @ values) if self.kind == "sampled" else x * values

    def double(self) -> Inverse:
        """The same, to be applied to float64 rows."""
        return Inverse(self.kind, self.values.double(), self.scale, self.widths)


def _solved(factor: Tensor, x: Tensor) -> Tensor:
    """x (L Lᵀ)⁻¹."""
    half = torch.linalg.solve_triangular(factor, x.reshape(-1, x.shape[-1]).T, upper=False)
    found: Tensor = torch.linalg.solve_triangular(factor.T, half, upper=True).T.reshape(x.shape)
    return found


@dataclass(frozen=True)
class Statistics:
    """What reference text uses: layer → moment of the coefficients (C, width m) and of the gradients (F, width d).

    ``outputs`` is the Fisher matrix of a layer's FFN output: E[δ δᵀ], δ the gradient of the negative
    log-likelihood of tokens sampled from the model (K-FAC, arXiv 1503.05671). ``name`` says which text,
    ``tokens`` how many were read.
    """

    inputs: Mapping[int, Moment]
    outputs: Mapping[int, Moment]
    name: str
    tokens: int

    def cost(self, deltas: Mapping[int, Tensor], columns: Mapping[int, Tensor]) -> float:
        """The KL that deltas (layer → [k, d]) are expected to cost: ½ Σ tr(F Δ C Δᵀ), nats per token."""
        total = 0.0
        for layer, delta in deltas.items():
            through = self.inputs[layer].at(columns[layer]).apply(delta.float().T)
            total += float((self.outputs[layer].apply(through.T) * delta).sum())
        return total / 2


@dataclass(frozen=True)
class Metric:
    """The cost of a change in a form that can be solved with: C⁻¹ and F⁻¹ of every layer, damped.

    A layer's are made when they are first asked for.
    """

    statistics: Statistics
    damping: float
    inputs: OnDemand[Inverse]
    outputs: OnDemand[Inverse]

    @staticmethod
    def of(statistics: Statistics, damping: float) -> Metric:
        return Metric(
            statistics,
            damping,
            OnDemand(statistics.inputs, lambda layer: statistics.inputs[layer].inverse(damping)),
            OnDemand(statistics.outputs, lambda layer: statistics.outputs[layer].inverse(damping)),
        )

    def make(self, layer: int) -> None:
        """Make a layer's inverses now."""
        _ = self.inputs[layer], self.outputs[layer]

    def restricted(self, layer: int, columns: Tensor) -> Inverse:
        """C⁻¹ where only some neurons [k] of a layer may change: the inverse of that part of C."""
        known = self.inputs.known(layer)
        if known is not None and known.values.shape[-1] == len(columns):
            return known
        moment = self.statistics.inputs[layer]
        part = moment.at(columns)
        return self.inputs[layer] if part is moment else part.inverse(self.damping)

    def through(self, layer: int, columns: Tensor, delta: Tensor) -> Tensor:
        """C Δ for a change [k, d] of some neurons [k] of a layer, damped as its inverse is."""
        return self.statistics.inputs[layer].at(columns).damped(delta.T, self.damping).T
