"""Which factors an adapter gets: exact where the patch is of low rank, else the least that still repair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lmrepair.errors import UsageError
from lmrepair.model import Net
from lmrepair.patch.patch import Patch
from lmrepair.patch.serving.factors import SERVED, Factors, Held, exact, held, least

LOW = 4  # a rank up to a quarter of the smaller side of the matrix counts as low


@dataclass(frozen=True)
class Chosen:
    """Factors, the patch's own rank, and what was seen of the failures: at every rank tried (none where exact)."""

    factors: Factors
    whole: int
    tried: tuple[Held, ...]

    @property
    def lost(self) -> tuple[str, ...]:
        """The ids of failures that the factors were seen not to repair."""
        at_rank = [found for found in self.tried if found.rank == self.factors.rank]
        return at_rank[-1].lost if at_rank else ()


def chosen(patch: Patch, widths: Mapping[int, int], net: Net | None, rank: str | None) -> Chosen:
    """The factors for ``rank``: None (exact if low, else the least that repair), "exact", "least" or a number.

    Raises UsageError for anything else, and where the failures must be looked at and there is no model for it.
    """
    whole = exact(patch, widths)
    low = min(SERVED[-1], min(patch.width, *widths.values()) // LOW)
    if rank == "exact" or (rank is None and whole.rank <= low):
        return Chosen(whole, whole.rank, ())
    if rank in (None, "least"):
        if net is None:
            raise UsageError(
                f"the patch has rank {whole.rank}, more than {low}: to cut it, its failures must be looked at; "
                "name the float model with --model, or take it as it is with --rank exact"
            )
        tried: list[Held] = []
        return Chosen(least(net, patch, whole, tried.append), whole.rank, tuple(tried))
    if not str(rank).isascii() or not str(rank).isdecimal() or int(str(rank)) < 1:
        raise UsageError(f"--rank {rank!r}: expected exact, least or a whole number above 0")
    factors = whole.cut(int(str(rank)))
    return Chosen(factors, whole.rank, (held(net, patch, factors),) if net is not None else ())
