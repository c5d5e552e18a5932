"""The commands that look for mistakes and take them away: ``diagnose`` and ``repair``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmrepair.cli.faults import fitting, solve_advice
from lmrepair.cli.options import (
    Failures,
    GateOptions,
    Json,
    Model,
    Named,
    RowOptions,
    SeededLoadOptions,
    Text,
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
from lmrepair.cli.patches import ServedAs, served_base, served_text, until_served
from lmrepair.cli.starting import decoder_of, start, texts_of
from lmrepair.failures import STANDARD_INPUT
from lmrepair.measure import free_for, visible
from lmrepair.methods import DEFAULT, Method

if TYPE_CHECKING:
    from lmrepair.loop import Repair

_WORDINGS = "Other wordings, solved together with the failures"
Preset = Annotated[str | None, typer.Option(help="A method's named settings; paper: as published.")]
Alone = Annotated[bool, typer.Option("--alone", help="Each failure from the untouched model (the papers).")]
Output = Annotated[Path | None, typer.Option(help="The patch file; with --alone, a folder of patches.")]
Failing = Annotated[int | None, typer.Option(min=1, help="Repair the first N failures that have mistakes.")]
Paraphrases = Annotated[
    bool,
    typer.Option("--paraphrases", help="The paraphrases that the failures come with.", rich_help_panel=_WORDINGS),
]
Prefixes = Annotated[
    int,
    typer.Option(
        min=0, metavar="N", help="N texts that the model writes by itself, each before every prompt.",
        rich_help_panel=_WORDINGS,
    ),
]  # fmt: skip
Texts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="What is to stay, read beside text that the model writes itself, by methods that minimise the change on "
        "reference text: a hundred other rows of the failures' own kind with right answers (in any form that failures "
        'have, with --template or --chat), JSON lines with "text", or plain text.',
    ),
]
OwnTexts = Annotated[
    int | None,
    typer.Option(
        min=0, metavar="N", show_default=False,
        help="How many texts the model writes for that (default: 48; mixtures 192); 0: the text of --statistics alone.",
    ),
]  # fmt: skip
Timings = Annotated[bool, typer.Option("--timings", help="Show where the time went, part by part.")]


def diagnose(
    failures: Failures, *, model: Model = None, rows_as: RowOptions, loading: SeededLoadOptions, as_json: Json = False
) -> None:
    """List the mistakes a model makes on failures: where it prefers which token to the wanted one."""
    rows, net = start(failures, rows_as, model, loading)
    from lmrepair.diagnosis import diagnose as find

    found = find(net, rows)
    data = diagnosis_data(net.name, found, decoder_of(net))
    show_result(data, diagnosis_text(found, texts_of(rows), decoder_of(net)), as_json)
    raise typer.Exit(1 if data["failing"] else 0)


def repair(
    failures: Failures,
    *,
    model: Model = None,
    method: Named = DEFAULT,
    preset: Preset = None,
    alone: Alone = False,
    output: Output = None,
    failing: Failing = None,
    reference: Text = None,
    paraphrases: Paraphrases = False,
    prefixes: Prefixes = 0,
    statistics: Texts = None,
    own_texts: OwnTexts = None,
    served_as: ServedAs = None,
    gating: GateOptions,
    rows_as: RowOptions,
    loading: SeededLoadOptions,
    timings: Timings = False,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Repair failures and save the patch: locate the neurons, solve, check, pass the gate, measure the drift."""
    clock = Clock()
    chosen = chosen_method(method, preset, loading.seed, settings)
    target = output or (None if alone else Path(f"{_stem(failures)}.patch.safetensors"))
    refuse_unwritable(target, alone)
    base = served_base(served_as, model, alone)
    from lmrepair.diagnosis import first_failing
    from lmrepair.failures import read_reference
    from lmrepair.loop import drawn_wordings, repair as repair_together, repair_alone
    from lmrepair.patch import PatchSize

    clock.part("importing")
    gate = chosen_gate(gating, reference, not alone and preset is None, rows_as.template, rows_as.end_turn)
    kept = rows_as.read_kept(statistics)
    rows, net = start(failures, rows_as, model, loading)
    clock.part("loading", {"placing": net.placing_seconds})
    text = read_reference(reference)
    fits = fitting(free_for(net), lambda room: solve_advice(net, net.tokenize(rows), chosen, alone, room))
    wordings = drawn_wordings(net, paraphrases, prefixes, loading.seed) if paraphrases or prefixes else None
    if failing is not None:
        rows = first_failing(net, rows, failing)
    served: dict[str, Any] | None = None
    clock.part("other")
    with fits, progress_bars() as progress:
        known = chosen_statistics(net, chosen, kept, own_texts, rows, progress)
        clock.part("statistics")
        if alone:
            repairs, sizes, drifts, saved = repair_alone(
                net, rows, chosen, text, target, progress, gate, known, wordings, gating.drift
            )
        else:

            def solve(with_method: Method) -> Repair:
                return repair_together(net, rows, with_method, text, progress, known, gate, wordings, gating.drift)

            one, served = until_served(net, base, chosen, solve) if base is not None else (solve(chosen), None)
            repairs = [one]
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
    if served is not None:
        data["served"] = served
        lines += served_text(served)
    show_result(data, [*lines, *(timings_text(clock.parts()) if timings else ())], as_json)
    raise typer.Exit(0 if _all_right(data) and not (served and served["lost"]) else 1)


def _stem(failures: Path) -> str:
    return "failures" if str(failures) == STANDARD_INPUT else failures.stem


def _all_right(data: dict[str, Any]) -> bool:
    return bool(data["repaired"] == data["failing"]) and not any(item["after"] for item in data["items"])
