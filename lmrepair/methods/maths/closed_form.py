"""One kernel for the closed forms: the least change of FFN output projections that meets wanted outputs.

For keys Z [n, k] (coefficients at n constraints), wanted changes R [n, d] of the output there and a metric
M [k, k], the change is Δ = M Zᵀ (Z M Zᵀ + εI)⁺ R [k, d]: an n×n system, M applied to n rows and never formed.
With ε = 0 and M = C⁻¹ it is the one of least tr(Δᵀ C Δ) among those with Z Δ = R (nearest to R where
that cannot hold). STAR's prior, ROME, EMMET, MEMIT and AlphaEdit differ in R, M and ε alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lmrepair.errors import UsageError
from lmrepair.model import DTYPES, Delta, Inverse, Moment, Product, blocks

CUTOFF = 1e-5  # singular values of Z M^½ below this share of the largest are left out

Apply = Callable[[Tensor], Tensor]  # rows x [n, k] → x M, in float64


@dataclass(frozen=True)
class Constraints:
    """n keys of one or more layers: ``moved`` is layer → Z M [n, k] (float32), ``gram`` Σ Z M Zᵀ [n, n] (float64).

    Keys of several layers are one constraint each: the layers' outputs there change by R in sum.
    """

    moved: Mapping[int, Tensor]
    gram: Tensor

    @staticmethod
    def of(keys: Mapping[int, Tensor], metrics: Mapping[int, Apply] | None = None) -> Constraints:
        """From layer → Z [n, k]; without ``metrics`` M is the identity."""
        moved, blocks = {}, []
        for layer, z in keys.items():
            rows = z.double()
            through = rows if metrics is None else metrics[layer](rows)
            blocks.append(rows @ through.T)
            moved[layer] = through.float()
        gram = torch.stack(blocks).sum(dim=0)
        return Constraints(moved, (gram + gram.T) / 2)

    def solve(self, wanted: Tensor, ridge: float = 0.0, cutoff: float = CUTOFF) -> dict[int, Tensor]:
        """Layer → Δ [k, d] (float32) for R [n, d] and ε = ``ridge``."""
        weights = self.weights(wanted, ridge, cutoff).float()
        return {layer: moved.T @ weights for layer, moved in self.moved.items()}

    def changes(
        self, dtype: torch.dtype, wanted: Tensor, ridge: float, *, fine: bool = False,
        undone: Mapping[int, Tensor] | None = None,
    ) -> dict[int, Delta]:  # fmt: skip
        """The same as factors of rank n in 16 bits, where patches of that dtype hold these.

        ``fine``: of twice the rank, with twice the bits for Z M. ``undone``: layer → [d], by which a change of what it
        adds to the stream is multiplied to be one of its output.
        """
        weights, undone = self.weights(wanted, ridge).float(), undone or {}
        asked = {layer: weights * undone[layer] if layer in undone else weights for layer in self.moved}
        if dtype not in DTYPES.values():
            return {layer: moved.T @ asked[layer] for layer, moved in self.moved.items()}
        made = Product.fine if fine else Product.of
        return {layer: made(moved, asked[layer]) for layer, moved in self.moved.items()}

    @property
    def scale(self) -> float:
        """The mean diagonal of Z M Zᵀ: the unit of a relative ε."""
        return float(self.gram.diagonal().mean())

    def weights(self, wanted: Tensor, ridge: float = 0.0, cutoff: float = CUTOFF) -> Tensor:
        """(Z M Zᵀ + εI)⁺ R [n, d] in float64, R taken as what the keys can bring about."""
        values, vectors = torch.linalg.eigh(self.gram)
        # The Gram matrix has squared singular values, and its own rounding noise at 1e-16 of the largest.
        least = max(cutoff**2, 1e-14) * values[-1].clamp(min=torch.finfo(torch.float64).tiny)
        # What is left out has no effect on the keys; a ridge alone would make it large all the same.
        inverse = torch.where(values > least, 1.0 / (values.clamp(min=least) + ridge), 0.0)
        found: Tensor = vectors @ (inverse[:, None] * (vectors.T @ wanted.double()))
        return found


def inverse_metric(inverse: Inverse, scale: float = 1.0) -> Apply:
    """M = scale·C⁻¹."""
    precise = inverse.double()
    return lambda rows: scale * precise.apply(rows)


def _principal(moment: Moment, least: float) -> Tensor:
    """Q [k, r]ᵀ of a full moment, or of one in blocks: directions along which it is above ``least``."""
    found = []
    for one in blocks(moment.widths) if moment.kind == "blocks" else [slice(0, len(moment.values))]:
        sizes, vectors = torch.linalg.eigh(moment.values[: one.stop - one.start, one].double())
        some = vectors[:, sizes > least].T
        found.append(torch.nn.functional.pad(some, (one.start, moment.values.shape[1] - one.stop)))
    return torch.cat(found)


def null_space(moment: Moment, threshold: float) -> Apply:
    """M = P = I − QQᵀ: what reference coefficients do not use.

    Q [k, r] spans the principal directions along which their second moment is above ``threshold`` times its
    mean diagonal. From sampled coefficients it is the sampled null space: directions that only text
    outside the sample uses are in it. Raises UsageError where nothing is left.
    """
    values = moment.values.double()
    if moment.kind == "diagonal":
        raise UsageError("a diagonal moment has no null space; keep the coefficients' moment full or sampled")
    least = threshold * float(moment.diagonal.double().mean())
    if moment.kind in ("full", "blocks"):
        used = _principal(moment, least)
    elif len(values) < values.shape[1]:
        sizes, vectors = torch.linalg.eigh(values @ values.T / len(values))
        kept = sizes > max(least, 1e-14 * float(sizes[-1]))
        used = (vectors[:, kept].T @ values) / (sizes[kept] * len(values)).sqrt()[:, None]
    else:
        return null_space(Moment("full", values.T @ values / len(values)), threshold)
    if len(used) == values.shape[-1]:
        raise UsageError(
            f"reference text uses all {len(used)} directions of the coefficients; raise the threshold "
            f"({threshold}), or keep fewer samples"
        )
    return lambda rows: rows - (rows @ used.to(rows.device).T) @ used.to(rows.device)
