"""List a model's mistakes, and what they are due to; and see whether a model under repair still lives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmrepair import door

if TYPE_CHECKING:
    from lmrepair.diagnosis.attribution import attributions as attributions, skipped_losses as skipped_losses
    from lmrepair.diagnosis.drift_probe import Heard as Heard, Probe as Probe, listening as listening
    from lmrepair.diagnosis.mistakes import (
        Diagnosis as Diagnosis,
        Mistake as Mistake,
        diagnose as diagnose,
        diagnoses as diagnoses,
        first_failing as first_failing,
    )

__getattr__, __dir__ = door(__name__)
