"""One cell of a study: read what it needs, repair, measure, and keep it all raw."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmrepair import door

if TYPE_CHECKING:
    from lmrepair.bench.cells.cell import measure as measure, solved_before as solved_before
    from lmrepair.bench.cells.in_turn import cumulative as cumulative
    from lmrepair.bench.cells.inputs import task_rows as task_rows

__getattr__, __dir__ = door(__name__)
