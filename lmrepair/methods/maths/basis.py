"""Semantic bases and steers: which move of a state makes one token likelier and no other.

The semantic basis of token v is column v of the pseudo-inverse of the head U [V, d], that is
(UᵀU)⁻¹ u_v (arXiv 2401.16184, 2503.12899). The pseudo-inverse itself is never formed: one streamed
pass gives the Gram matrix UᵀU [d, d], its Cholesky factor is kept, and a basis is one solve with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lmrepair.model import Net, weight, whole

ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Bases:
    """A head, factored when that is first asked for: ``head`` [V, d] as it is stored, ``gain`` [d] it is scaled by."""

    head: Tensor
    gain: Tensor

    @staticmethod
    def of(net: Net, gain: bool = False) -> Bases:
        """Of a net's head; with ``gain``, as the state before the final norm's gain sees it (U·diag γ)."""
        head = whole(weight(net.anatomy.head))
        scale = net.anatomy.gain.double() if gain else torch.ones(net.hidden, dtype=torch.float64)
        return Bases(head, scale.to(head.device))

    @property
    def exact(self) -> bool:
        """Whether the head has full column rank."""
        return self._factored[1]

    @cached_property
    def _factored(self) -> tuple[Tensor, bool]:
        """The Cholesky factor [d, d] of UᵀU for U = head·diag(gain), or its pseudo-inverse, and which of them it is.

        V·d² float64 multiplications, nothing of size V×d kept.
        """
        width = self.head.shape[1]
        gram = torch.zeros(width, width, dtype=torch.float64, device=self.head.device)
        for rows in self.head.split(ROWS_AT_ONCE):
            part = rows.double() * self.gain
            gram += part.T @ part
        factor, failed = torch.linalg.cholesky_ex(gram)
        diagonal = factor.diagonal()
        # Below this the solve would return rounding errors of the Gram matrix as directions.
        if int(failed) == 0 and float(diagonal.min() / diagonal.max()) > 1e-6:
            return factor, True
        return torch.linalg.pinv(gram, hermitian=True, rtol=1e-12), False

    def __getitem__(self, tokens: Tensor) -> Tensor:
        """The bases [n, d] of tokens [n], in float64."""
        rows = (self.head[tokens.to(self.head.device)].double() * self.gain).T
        factor, exact = self._factored
        found = torch.cholesky_solve(rows, factor) if exact else factor @ rows
        return found.T

    def steers(self, wanted: Tensor, said: Tensor) -> Tensor:
        """Steers [n, d] = basis of wanted − basis of said, in float64: raise one logit, lower the other."""
        tokens, places = torch.unique(torch.cat([wanted, said]), return_inverse=True)
        bases = self[tokens][places]
        return bases[: len(wanted)] - bases[len(wanted) :]


def by_spread(steers: Tensor) -> Tensor:
    """Steers [n, d], each divided by its inter-quartile range (robust to outliers)."""
    quartiles = torch.quantile(steers, torch.tensor([0.25, 0.75], dtype=steers.dtype, device=steers.device), dim=1)
    spread = (quartiles[1] - quartiles[0]).clamp(min=torch.finfo(steers.dtype).tiny)
    return steers / spread[:, None]
