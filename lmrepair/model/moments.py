"""Second moments of what flows through a layer on reference text, and their damped inverses.

A moment M = E[x xᵀ] is kept full [w, w], as n sampled rows [n, w], or as its diagonal [w]. Its inverse is
applied, and formed only where it is full: n sampled rows need one n×n system (Woodbury's identity).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lmrepair.errors import UsageError

KINDS = ("full", "sampled", "diagonal")


@dataclass(frozen=True)
class Moment:
    """E[x xᵀ] of vectors of one width: ``values`` is [w, w] (full), x₁…xₙ [n, w] (sampled), or [w] (diagonal)."""

    kind: str
    values: Tensor

    def __post_init__(self) -> None:
        fits = {"full": self.values.dim() == 2, "sampled": self.values.dim() == 2, "diagonal": self.values.dim() == 1}
        if not fits.get(self.kind, False):
            raise UsageError(f"a {self.kind!r} moment of shape {tuple(self.values.shape)}; known: {', '.join(KINDS)}")

    @property
    def diagonal(self) -> Tensor:
        """E[x²], [w]."""
        if self.kind == "full":
            return self.values.diagonal()
        return self.values.square().mean(dim=0) if self.kind == "sampled" else self.values

    def at(self, columns: Tensor) -> Moment:
        """The moment of some of the entries alone."""
        if len(columns) == self.values.shape[-1]:
            return self
        chosen = columns.to(self.values.device)
        values = self.values[..., chosen]
        return Moment(self.kind, values[chosen] if self.kind == "full" else values)

    def apply(self, x: Tensor) -> Tensor:
        """x M, for rows x [n, w]."""
        values = self.values.to(x)
        if self.kind == "full":
            return x @ values
        return (x @ values.T) @ values / len(values) if self.kind == "sampled" else x * values

    def damped(self, x: Tensor, damping: float) -> Tensor:
        """x (M + damping·mean(diag M)·I), what ``inverse`` takes back."""
        return self.apply(x) + _added(self, damping) * x

    def inverse(self, damping: float) -> Inverse:
        """(M + damping·mean(diag M)·I)⁻¹, factored in float64 and applied in float32."""
        values = self.values.double()
        added = _added(self, damping)
        if self.kind == "diagonal":
            return Inverse("diagonal", (1.0 / (values + added)).float())
        if self.kind == "full":
            values = values + added * torch.eye(len(values), dtype=torch.float64, device=values.device)
            return Inverse("full", torch.cholesky_inverse(torch.linalg.cholesky(values)).float())
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


def _added(moment: Moment, damping: float) -> float:
    scale = float(moment.diagonal.double().mean())
    return damping * scale if scale > 0 else 1.0


@dataclass(frozen=True)
class Asked:
    """The statistics of reference text that a method asks for.

    ``inputs`` and ``outputs``: how the moments of coefficients and of gradients are kept: "full", "sampled",
    "diagonal", "none" (no direction is preferred), or "auto", by width. ``samples``: how many rows are kept.
    ``damping`` is added to the moments before they are inverted, as a share of their mean diagonal.
    """

    inputs: str
    outputs: str
    samples: int
    damping: float


@dataclass(frozen=True)
class Inverse:
    """The inverse of a damped moment; ``apply`` multiplies rows by it."""

    kind: str
    values: Tensor
    scale: float = 1.0

    def apply(self, x: Tensor) -> Tensor:
        """x M⁻¹, for x [..., w]."""
        values = self.values.to(x.device)
        if self.kind == "full":
            return x @ values
        return self.scale * (x - (x @ values.T) @ values) if self.kind == "sampled" else x * values

    def double(self) -> Inverse:
        """The same, to be applied to float64 rows."""
        return Inverse(self.kind, self.values.double(), self.scale)


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
    """The cost of a change in a form that can be solved with: C⁻¹ and F⁻¹ of every layer, damped."""

    statistics: Statistics
    damping: float
    inputs: Mapping[int, Inverse]
    outputs: Mapping[int, Inverse]

    @staticmethod
    def of(statistics: Statistics, damping: float) -> Metric:
        return Metric(
            statistics,
            damping,
            {layer: moment.inverse(damping) for layer, moment in statistics.inputs.items()},
            {layer: moment.inverse(damping) for layer, moment in statistics.outputs.items()},
        )

    def restricted(self, layer: int, columns: Tensor) -> Inverse:
        """C⁻¹ where only some neurons [k] of a layer may change: the inverse of that part of C."""
        moment = self.statistics.inputs[layer]
        part = moment.at(columns)
        return self.inputs[layer] if part is moment else part.inverse(self.damping)

    def through(self, layer: int, columns: Tensor, delta: Tensor) -> Tensor:
        """C Δ F for a change [k, d] of some neurons [k] of a layer, damped as the inverses are."""
        inputs, outputs = self.statistics.inputs[layer].at(columns), self.statistics.outputs[layer]
        return outputs.damped(inputs.damped(delta.T, self.damping).T, self.damping)
