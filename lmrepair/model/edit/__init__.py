"""Every write to a weight: what is done to a layer, kept so that it can be taken back bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmrepair import door

if TYPE_CHECKING:
    from lmrepair.model.edit.changes import Change as Change, Edit as Edit, LowRank as LowRank
    from lmrepair.model.edit.products import (
        EXPONENT as EXPONENT,
        SPREAD as SPREAD,
        Delta as Delta,
        Product as Product,
        grown as grown,
        no_change as no_change,
        patched as patched,
        written_out as written_out,
    )
    from lmrepair.model.edit.trial import (
        Projections as Projections,
        Trial as Trial,
        put as put,
        same_bits as same_bits,
        take as take,
    )
    from lmrepair.model.edit.unwritten import beside as beside

__getattr__, __dir__ = door(__name__)
