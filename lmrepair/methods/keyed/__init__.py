"""Methods that write values at key positions: ROME, EMMET, MEMIT, AlphaEdit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmrepair import door

if TYPE_CHECKING:
    from lmrepair.methods.keyed.keyed import spanned as spanned
    from lmrepair.methods.keyed.memit import AlphaEdit as AlphaEdit, Memit as Memit
    from lmrepair.methods.keyed.rome import Emmet as Emmet, Rome as Rome

__getattr__, __dir__ = door(__name__)
