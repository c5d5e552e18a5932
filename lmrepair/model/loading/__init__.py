"""Models in: from a folder, a GGUF file, the hub or the package, whole and in the dtype asked for, or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmrepair import door

if TYPE_CHECKING:
    from lmrepair.model.loading.checkpoint import quietly as quietly
    from lmrepair.model.loading.cutting import ranks as ranks
    from lmrepair.model.loading.gguf_file import open_gguf as open_gguf
    from lmrepair.model.loading.opening import EMBEDDED as EMBEDDED, load as load

__getattr__, __dir__ = door(__name__)
