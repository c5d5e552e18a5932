"""What a person wants to know of a model before its first repair: places, tokens, memory and time, engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmrepair import door

if TYPE_CHECKING:
    from lmrepair.measure.doctor.engines import Served as Served, served as served
    from lmrepair.measure.doctor.estimate import Need as Need, Speed as Speed, needs as needs
    from lmrepair.measure.doctor.examined import Examination as Examination, examine as examine
    from lmrepair.measure.doctor.memory import free as free, free_for as free_for
    from lmrepair.measure.doctor.products import slowness as slowness
    from lmrepair.measure.doctor.tokenizer import Trap as Trap, traps as traps

__getattr__, __dir__ = door(__name__)
