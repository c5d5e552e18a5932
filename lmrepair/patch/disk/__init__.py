"""Checkpoints on the disk, patched without being loaded: every other byte stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmrepair import door

if TYPE_CHECKING:
    from lmrepair.patch.disk.copies import (
        beside as beside,
        place_folder as place_folder,
        refuse_short_of_space as refuse_short_of_space,
        said_in_one_line as said_in_one_line,
    )
    from lmrepair.patch.disk.placing import OtherDtypeError as OtherDtypeError
    from lmrepair.patch.disk.source import folder_of as folder_of
    from lmrepair.patch.disk.stored import Checkpoint as Checkpoint, read_checkpoint as read_checkpoint
    from lmrepair.patch.disk.writing import (
        Rewritten as Rewritten,
        Writing as Writing,
        refuse_output as refuse_output,
        rewrite as rewrite,
    )

__getattr__, __dir__ = door(__name__)
