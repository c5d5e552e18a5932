"""Studies: a grid of cells measured one by one, on processes or on Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmrepair import door

if TYPE_CHECKING:
    from lmrepair.bench.grid_file import read_grid as read_grid
    from lmrepair.bench.run import bench as bench, plan as plan

__getattr__, __dir__ = door(__name__)
