"""The commands that look and change nothing: ``doctor``, ``evaluate``, ``verify``, ``show``."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from lmrepair.cli.options import (
    SHIPPED,
    Evaluated,
    Failures,
    GridFile,
    HeldOut,
    Json,
    Kinds,
    LoadOptions,
    Model,
    NoTexts,
    PatchFile,
    RowOptions,
    SeededLoadOptions,
    Text,
    read_references,
)
from lmrepair.cli.output import (
    doctor_data,
    doctor_text,
    drift_text,
    measures_data,
    measures_text,
    patch_data,
    patch_text,
    progress_bars,
    show_result,
)
from lmrepair.cli.patches import EngineOptions, verify_served
from lmrepair.cli.starting import load_net
from lmrepair.errors import UsageError
from lmrepair.measure import plain, visible

Judge = Annotated[
    str | None, typer.Option("--model", help="The patch's model: says which failure needed each layer; or embedded.")
]


def doctor(*, model: Model = None, loading: SeededLoadOptions, as_json: Json = False) -> None:
    """Look at a model before its first repair: what was placed, traps of its tokenizer, memory and time, engines."""
    from lmrepair.measure import examine

    data = doctor_data(examine(load_net(model, loading)))
    show_result(data, doctor_text(data), as_json)
    raise typer.Exit(0 if data["fits"] else 1)


def evaluate(
    failures: Failures,
    *,
    model: Model = None,
    patch: Evaluated = None,
    reference: Kinds = None,
    held_out: HeldOut = None,
    grid: GridFile = None,
    no_texts: NoTexts = False,
    rows_as: RowOptions,
    loading: SeededLoadOptions,
    as_json: Json = False,
) -> None:
    """Measure a model on failures, and with --patch what the patch changes: effect, side effects, drift by kind."""
    from lmrepair.measure import Material, measure, read_grid
    from lmrepair.patch import Patch

    loaded = Patch.load(patch) if patch is not None else None
    material = Material(
        rows_as.read(failures),
        replace(rows_as, limit=None).read(held_out) if held_out is not None else (),
        read_references(reference or []),
        read_grid(None if grid == SHIPPED else grid) if grid is not None else None,
    )
    net = load_net(model, loading if loaded is None else loading.for_patch(loaded))
    if loaded is not None and loaded.is_applied(net):
        loaded.revert(net)
    with progress_bars() as progress:
        found = measure(net, material, loaded, not no_texts, progress)
    path = None if patch is None else str(patch)
    data = measures_data(net.name, found, material.grid, path)
    show_result(data, measures_text(data), as_json)


def verify(
    patch: PatchFile,
    *,
    model: Model = None,
    reference: Text = None,
    served: EngineOptions,
    loading: SeededLoadOptions,
    as_json: Json = False,
) -> None:
    """Check on a fresh load that a patch repairs what it says, measure its drift, and take it back."""
    if served.engine is not None:
        verify_served(served.engine, patch, model, served, loading, as_json)
    if served.base is not None or served.adapter is not None or served.rank is not None:
        raise UsageError("--base, --adapter and --rank are for an engine; give --engine llama.cpp or --engine peft")
    from lmrepair.failures import read_reference
    from lmrepair.measure import verify as check
    from lmrepair.patch import Patch

    loaded, text = Patch.load(patch), read_reference(reference)
    net = load_net(model, loading.for_patch(loaded))
    result = check(net, loaded, text)
    data = {
        "verified": result.verified,
        "model": net.name,
        "failures": len(result.diagnoses),
        "repaired": result.repaired,
        "restored": result.restored,
        "drift": plain(result.drift),
    }
    held = f"{result.repaired} of {len(result.diagnoses)} failures"
    lines = [
        f"{'verified' if result.verified else 'NOT verified'}: {held} hold under teacher forcing and in greedy text",
        f"drift      {drift_text(result.drift.kl, result.drift.agreement)} on {visible(text.name)}",
        f"taken back {'bit for bit' if result.restored else 'NOT bit for bit'}",
    ]
    show_result(data, lines, as_json)
    raise typer.Exit(0 if result.verified else 1)


def show(
    patch: PatchFile,
    *,
    model: Judge = None,
    loading: LoadOptions,
    as_json: Json = False,
) -> None:
    """Say what is in a patch file, after checking it; with --model, which failure needed each layer."""
    from lmrepair.measure import needed_by
    from lmrepair.patch import Patch

    loaded = Patch.load(patch)
    net = load_net(model, loading.for_patch(loaded)) if model is not None else None
    data = patch_data(loaded, needed_by(net, loaded) if net is not None else None)
    show_result(data, patch_text(data), as_json)
