"""What a patch will do to another's repairs, seen before either is applied with the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lmrepair.model import Batch, Net, Preference, beside, settled
from lmrepair.patch.patch import Patch


@dataclass(frozen=True)
class Forecast:
    """A failure that patch ``owner`` repairs: its least margin with that patch alone, and with ``other`` too.

    ``margin`` is how far the wanted token is ahead of its best rival where it is least so; ``foretold`` the same
    with the other patch added. Not above 0: the repair is in danger.
    """

    owner: int
    other: int
    failure: str
    margin: float
    foretold: float

    @property
    def danger(self) -> bool:
        return self.foretold <= 0


def forecasts(net: Net, patches: Sequence[Patch]) -> list[Forecast]:
    """For every failure that a patch repairs, and every other patch: what that one will make of its margin.

    One forward pass over a patch's failures with the patch on, and one more for each other patch, whose change stays
    beside the weights. The net must be the untouched model; it is left as it was.
    """
    found = []
    for owner, patch in enumerate(patches):
        repaired = [item.tokens for item in patch.items if item.repaired]
        if not repaired:
            continue
        with patch.on(net), settled(net.model), torch.no_grad():
            batches = net.batches(repaired)
            alone = _least(net, batches)
            for other, theirs in enumerate(patches):
                if other == owner:
                    continue
                with beside(net, theirs.changes):
                    both = _least(net, batches)
                pairs = zip(repaired, alone, both, strict=True)
                found += [Forecast(owner, other, tokens.id, margin, now) for tokens, margin, now in pairs]
    return found


def _least(net: Net, batches: Sequence[Batch]) -> list[float]:
    """By how much the wanted tokens are preferred where they are least so, of each failure in order."""
    found = []
    for batch in batches:
        gap = Preference.of(net.logits(batch), batch.wanted).gap
        found += [-float(gap[batch.owner == at].max()) for at in range(len(batch.tokens))]
    return found
