"""The maths that methods share: bases, closed forms, margins, the dual system, Adam, the length of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmrepair import door

if TYPE_CHECKING:
    from lmrepair.methods.maths.basis import Bases as Bases, by_spread as by_spread
    from lmrepair.methods.maths.closed_form import (
        Apply as Apply,
        Constraints as Constraints,
        inverse_metric as inverse_metric,
        null_space as null_space,
    )
    from lmrepair.methods.maths.direct_path import (
        Slopes as Slopes,
        contrasting as contrasting,
        in_stream as in_stream,
        lengths_behind as lengths_behind,
        read_slopes as read_slopes,
        scaled as scaled,
        undone as undone,
    )
    from lmrepair.methods.maths.dual import kernel as kernel, system_of as system_of, weights_for as weights_for
    from lmrepair.methods.maths.linearised import Linearised as Linearised, Used as Used
    from lmrepair.methods.maths.margins import Factors as Factors, Margins as Margins, read_margins as read_margins
    from lmrepair.methods.maths.optimiser import (
        Moments as Moments,
        Way as Way,
        adam as adam,
        again as again,
        go as go,
        steepest as steepest,
        stride_after as stride_after,
        units as units,
    )
    from lmrepair.methods.maths.spans import directions as directions, shared_out as shared_out
    from lmrepair.methods.maths.tail import Tail as Tail

__getattr__, __dir__ = door(__name__)
