"""The change itself: a patch as a value, as a file, and in a model folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmrepair import door

if TYPE_CHECKING:
    from lmrepair.patch.folder import refuse_existing as refuse_existing, save_model as save_model
    from lmrepair.patch.format import Item as Item, Made as Made
    from lmrepair.patch.patch import Patch as Patch, PatchSize as PatchSize

__getattr__, __dir__ = door(__name__)
