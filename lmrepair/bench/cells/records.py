"""What a bench writes down: answers, effects, drift, cost and patches as plain values for JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lmrepair.bench.cells.in_turn import Point
from lmrepair.failures import Failure
from lmrepair.loop import Outcome, Repair
from lmrepair.measure import (
    Answer,
    Effect,
    GridEffects,
    corpus_bleu,
    decoder,
    greedy_texts,
    plain,
    teacher_texts,
    text_scores,
)
from lmrepair.model import Net
from lmrepair.patch import Patch

DIGITS = 6
HELDOUT = ("token_match", "exact_match", "bleu")


def failure_data(net: Net, row: Failure, before: Answer, after: Answer, reason: str) -> dict[str, Any]:
    """A failure with what the model made of it before and after a repair."""
    return {
        **_row(net, row, before.tokens.target),
        "repaired": after.holds,
        "reason": reason,
        "before": answer_data(net, before),
        "after": answer_data(net, after),
    }


def outcome_data(net: Net, outcome: Outcome) -> dict[str, Any]:
    """The same for a failure of which only the mistakes are known, at its turn."""
    decode = decoder(net)
    before, after = (
        {"mistakes": [[m.position, m.said, decode([m.said])] for m in found]}
        for found in (outcome.before, outcome.after)
    )
    return {
        **_row(net, outcome.failure, outcome.tokens.target),
        "repaired": outcome.failing and outcome.repaired,
        "reason": outcome.reason,
        "before": before,
        "after": after,
    }


def _row(net: Net, row: Failure, target: Sequence[int]) -> dict[str, Any]:
    decode = decoder(net)
    return {
        "id": row.id,
        "prompt": row.shown,
        "target": row.target,
        "tokens": [[token, decode([token])] for token in target],
    }


def answer_data(net: Net, answer: Answer) -> dict[str, Any]:
    """An answer, raw and scored. What is preferred is the target but for the ``mistakes``: [position, id, text]."""
    decode = decoder(net)
    said = [
        [position, token, decode([token])]
        for position, (token, wanted) in enumerate(zip(answer.preferred, answer.tokens.target, strict=True))
        if token != wanted
    ]
    ((preferred, target),) = teacher_texts(net, [answer])
    found: dict[str, Any] = {
        "mistakes": said,
        "rank": list(answer.rank),
        "gap": [round(gap, 4) for gap in answer.gap],
        "preferred": preferred,
        "teacher": {"token_match": answer.match, **plain(text_scores(preferred, target))},
    }
    for written, wanted in greedy_texts(net, [answer]):
        found |= {"written_ids": list(answer.written or ()), "written": written}
        found["greedy"] = plain(text_scores(written, wanted))
    return found


def heldout_data(net: Net, found: Sequence[Answer]) -> dict[str, Any] | None:
    """Held-out rows under teacher forcing: shares, BLEU over all, and each row's preferred text."""
    if not found:
        return None
    pairs = teacher_texts(net, found)
    tokens = sum(len(answer.tokens.target) for answer in found)
    return {
        "rows": len(found),
        "token_match": sum(answer.right for answer in found) / tokens,
        "exact_match": statistics.fmean(answer.match == 1.0 for answer in found),
        "bleu": corpus_bleu([text for text, _ in pairs], [target for _, target in pairs]),
        "preferred": [[at, text] for at, (text, _) in enumerate(pairs)],
    }


def heldout_change(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> dict[str, Any]:
    """Held-out figures after a repair, with the change; of the texts, those that changed."""
    if before is None or after is None:
        return {}
    changed = [new for old, new in zip(before["preferred"], after["preferred"], strict=True) if old != new]
    change = {key: after[key] - before[key] for key in HELDOUT}
    return {"heldout": {**after, "preferred": changed, "change": change}}


def effect_data(effect: Effect) -> dict[str, Any]:
    """An effect with its change, figure by figure."""
    found: dict[str, Any] = plain(effect)
    found["change"] = {key: found["after"][key] - value for key, value in found["before"].items()}
    return found


def grid_data(effects: GridEffects) -> dict[str, Any]:
    parts = {key: effect_data(getattr(effects, key)) for key in ("cell", "row", "column", "elsewhere")}
    return {"g": effects.g, "s": effects.s, **parts}


def point_data(point: Point) -> dict[str, Any]:
    """A point of a cumulative curve; drift by the kind of its reference."""
    return {
        "k": point.repairs,
        "repaired": point.repaired,
        "holding": point.holding,
        "right": point.right,
        "heldout": plain(point.held_out) if point.held_out else None,
        "drift": {name.split("@")[0]: plain(drift) for name, drift in point.drift.items()},
    }


def cost_data(one: Repair, memory: int | None) -> dict[str, Any]:
    return {**plain(one.cost), "peak_memory": memory}


def patch_data(net: Net, patch: Patch | None) -> dict[str, Any]:
    """How much of the model is changed; ``parameters`` counts the numbers in the changed neurons."""
    if patch is None:
        return {"layers": 0, "neurons": 0, "parameters": 0, "bytes": 0}
    parameters = patch.neurons * net.hidden
    return {"layers": patch.layers, "neurons": patch.neurons, "parameters": parameters, "bytes": patch.size}
