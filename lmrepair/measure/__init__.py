"""What a model answers and what a patch changes: scores, side effects, drift, as values and plain data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmrepair import door

if TYPE_CHECKING:
    from lmrepair.measure.answer import (
        Answer as Answer,
        Scores as Scores,
        answers as answers,
        decoder as decoder,
        evaluate as evaluate,
        greedy_texts as greedy_texts,
        scores as scores,
        teacher_texts as teacher_texts,
    )
    from lmrepair.measure.doctor import (
        Examination as Examination,
        Trap as Trap,
        examine as examine,
        free as free,
        free_for as free_for,
        slowness as slowness,
    )
    from lmrepair.measure.drift import (
        Drift as Drift,
        Edit as Edit,
        compare as compare,
        measure_drift as measure_drift,
        measure_drift_by_kind as measure_drift_by_kind,
        refuse_namesakes as refuse_namesakes,
        text_batches as text_batches,
        worst_first as worst_first,
    )
    from lmrepair.measure.effects import (
        Effect as Effect,
        SideEffects as SideEffects,
        effect as effect,
        neighbours as neighbours,
        probes as probes,
        side_effects as side_effects,
    )
    from lmrepair.measure.grid import (
        Grid as Grid,
        GridEffects as GridEffects,
        grid_effects as grid_effects,
        read_grid as read_grid,
    )
    from lmrepair.measure.intervals import Interval as Interval, bootstrap as bootstrap, paired as paired
    from lmrepair.measure.shown import plain as plain, visible as visible
    from lmrepair.measure.summary import Material as Material, Measures as Measures, measure as measure
    from lmrepair.measure.texts import corpus_bleu as corpus_bleu, text_scores as text_scores
    from lmrepair.measure.verification import needed_by as needed_by, verify as verify

__getattr__, __dir__ = door(__name__)
