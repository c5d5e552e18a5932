"""Whatever goes wrong is one line and a status; where memory runs out, the line says what would fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmrepair import door

if TYPE_CHECKING:
    from lmrepair.cli.faults.memory import (
        fitting as fitting,
        load_advice as load_advice,
        solve_advice as solve_advice,
    )
    from lmrepair.cli.faults.verdicts import (
        INTERRUPTED as INTERRUPTED,
        Stopped as Stopped,
        guarded as guarded,
        memory_ran_out as memory_ran_out,
        verdict as verdict,
    )

__getattr__, __dir__ = door(__name__)
