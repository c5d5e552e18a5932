"""The commands that look for mistakes and take them away: ``diagnose`` and ``repair``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from lmrepair.cli.options import (
    Chat,
    Device,
    Dtype,
    EndTurn,
    Failures,
    Json,
    Limit,
    Model,
    Seed,
    Trust,
    Wrap,
    chosen_gate,
    chosen_method,
    chosen_statistics,
    refuse_unwritable,
)
from lmrepair.cli.output import (
    Clock,
    diagnosis_data,
    diagnosis_text,
    progress_bars,
    repair_data,
    repair_text,
    repair_timings,
    show_result,
    timings_text,
)
from lmrepair.cli.starting import decoder_of, start, texts_of
from lmrepair.failures import STANDARD_INPUT
from lmrepair.measure import visible
from lmrepair.methods import DEFAULT


def diagnose(
    failures: Failures,
    model: Model = None,
    template: Wrap = None,
    chat: Chat = False,
    end_turn: EndTurn = True,
    limit: Limit = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """List the mistakes a model makes on failures: where it prefers which token to the wanted one."""
    rows, net = start(failures, template, limit, chat, end_turn, model, device, dtype, seed, trust)
    from lmrepair.diagnosis import diagnose as find

    found = find(net, rows)
    data = diagnosis_data(net.name, found, decoder_of(net))
    show_result(data, diagnosis_text(found, texts_of(rows), decoder_of(net)), as_json)
    raise typer.Exit(1 if data["failing"] else 0)


def repair(
    failures: Path,
    model: str | None = None,
    method: str = DEFAULT,
    preset: str | None = None,
    alone: bool = False,
    output: Path | None = None,
    failing: int | None = None,
    reference: Path | None = None,
    statistics: Path | None = None,
    own_texts: int | None = None,
    paraphrases: bool = False,
    prefixes: int = 0,
    max_kl: float | None = None,
    protect: Path | None = None,
    memory: list[Path] | None = None,
    drift: str = "quick",
    template: str | None = None,
    chat: bool = False,
    end_turn: bool = True,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    trust: bool = False,
    timings: bool = False,
    as_json: bool = False,
    **settings: Any,
) -> None:
    """Repair failures and save the patch: locate the neurons, solve, check, pass the gate, measure the drift."""
    clock = Clock()
    chosen = chosen_method(method, preset, seed, settings)
    target = output or (None if alone else Path(f"{_stem(failures)}.patch.safetensors"))
    refuse_unwritable(target, alone)
    from lmrepair.diagnosis import diagnose as find
    from lmrepair.failures import read_reference
    from lmrepair.loop import drawn_wordings, repair as repair_together, repair_alone
    from lmrepair.patch import PatchSize

    clock.part("importing")
    gate = chosen_gate(max_kl, protect, memory or (), reference, template, not alone and preset is None, end_turn)
    rows, net = start(failures, template, limit, chat, end_turn, model, device, dtype, seed, trust)
    clock.part("loading", {"placing": net.placing_seconds})
    text = read_reference(reference)
    known = chosen_statistics(net, chosen, statistics, own_texts)
    wordings = drawn_wordings(net, paraphrases, prefixes, seed) if paraphrases or prefixes else None
    if failing is not None:
        rows = [row for row, found in zip(rows, find(net, rows), strict=True) if found.mistakes][:failing]
    with progress_bars() as progress:
        if alone:
            repairs, sizes, drifts, saved = repair_alone(
                net, rows, chosen, text, target, progress, gate, known, wordings, drift
            )
        else:
            repairs = [repair_together(net, rows, chosen, text, progress, known, gate, wordings, drift)]
            patches = [one.patch for one in repairs if one.patch is not None]
            sizes = [PatchSize.of(patch) for patch in patches]
            drifts = [one.drift for one in repairs if one.drift is not None]
            for patch in patches:
                patch.save(Path(str(target)))
            saved = bool(patches)
    clock.part("other", repair_timings(repairs))
    path = str(target) if saved and target is not None else None
    data = {**repair_data(net.name, repairs, sizes, drifts, path, decoder_of(net)), "timings": clock.parts()}
    lines = repair_text(data, texts_of(rows), visible(text.name))
    show_result(data, [*lines, *(timings_text(clock.parts()) if timings else ())], as_json)
    raise typer.Exit(0 if _all_right(data) else 1)


def _stem(failures: Path) -> str:
    return "failures" if str(failures) == STANDARD_INPUT else failures.stem


def _all_right(data: dict[str, Any]) -> bool:
    return bool(data["repaired"] == data["failing"]) and not any(item["after"] for item in data["items"])
