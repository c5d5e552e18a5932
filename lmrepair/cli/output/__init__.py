"""What the commands print: lines, JSON, progress bars."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmrepair import door

if TYPE_CHECKING:
    from lmrepair.cli.output.bars import progress_bars as progress_bars
    from lmrepair.cli.output.clock import Clock as Clock, repair_timings as repair_timings, timings_text as timings_text
    from lmrepair.cli.output.console import (
        drop_output as drop_output,
        notes as notes,
        open_streams as open_streams,
        say as say,
        say_json as say_json,
        show_result as show_result,
        unheard as unheard,
    )
    from lmrepair.cli.output.render import (
        diagnosis_data as diagnosis_data,
        diagnosis_text as diagnosis_text,
        drift_text as drift_text,
        patch_data as patch_data,
        patch_text as patch_text,
        repair_data as repair_data,
        repair_text as repair_text,
    )
    from lmrepair.cli.output.render_doctor import doctor_data as doctor_data, doctor_text as doctor_text
    from lmrepair.cli.output.render_measures import measures_data as measures_data, measures_text as measures_text

__getattr__, __dir__ = door(__name__)
