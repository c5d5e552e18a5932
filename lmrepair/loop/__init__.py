"""The way from failures to a patch: the loop, the solver, the gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmrepair import door

if TYPE_CHECKING:
    from lmrepair.loop.alone import repair_alone as repair_alone
    from lmrepair.loop.gate import Gate as Gate
    from lmrepair.loop.loop import repair as repair, repair_each as repair_each
    from lmrepair.loop.outcome import Outcome as Outcome, Repair as Repair
    from lmrepair.loop.search import Gated as Gated
    from lmrepair.loop.solver import drawn_wordings as drawn_wordings

__getattr__, __dir__ = door(__name__)
