"""The commands that look and change nothing: ``evaluate``, ``verify``, ``show``."""

from __future__ import annotations

import typer

from lmrepair.cli.options import (
    SHIPPED,
    Chat,
    Device,
    Dtype,
    EndTurn,
    Evaluated,
    Failures,
    GridFile,
    HeldOut,
    Json,
    Kinds,
    Limit,
    Model,
    NoTexts,
    PatchFile,
    Seed,
    Text,
    Trust,
    Wrap,
    read_references,
)
from lmrepair.cli.output import (
    drift_text,
    measures_data,
    measures_text,
    patch_data,
    patch_text,
    progress_bars,
    show_result,
)
from lmrepair.cli.patches import Adapter, BaseFile, Engine, Rank, verify_served
from lmrepair.cli.starting import dtype_of, load_net
from lmrepair.measure import plain, visible


def evaluate(
    failures: Failures,
    model: Model = None,
    patch: Evaluated = None,
    reference: Kinds = None,
    held_out: HeldOut = None,
    grid: GridFile = None,
    no_texts: NoTexts = False,
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
    """Measure a model on failures, and with --patch what the patch changes: effect, side effects, drift by kind."""
    from lmrepair.failures import read_failures
    from lmrepair.measure import Material, measure, read_grid
    from lmrepair.patch import Patch

    loaded = Patch.load(patch) if patch is not None else None
    material = Material(
        read_failures(failures, template, limit, chat, end_turn),
        read_failures(held_out, template, None, chat, end_turn) if held_out is not None else (),
        read_references(reference or []),
        read_grid(None if grid == SHIPPED else grid) if grid is not None else None,
    )
    net = load_net(model, device, dtype if loaded is None else dtype_of(dtype, loaded), seed, trust)
    if loaded is not None and loaded.is_applied(net):
        loaded.revert(net)
    with progress_bars() as progress:
        found = measure(net, material, loaded, not no_texts, progress)
    path = None if patch is None else str(patch)
    data = measures_data(net.name, found, material.grid, path)
    show_result(data, measures_text(data), as_json)


def verify(
    patch: PatchFile,
    model: Model = None,
    reference: Text = None,
    engine: Engine = None,
    base: BaseFile = None,
    adapter: Adapter = None,
    rank: Rank = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Check on a fresh load that a patch repairs what it says, measure its drift, and take it back."""
    if engine is not None:
        verify_served(engine, patch, model, base, adapter, rank, device, dtype, trust, as_json)
    from lmrepair.failures import read_reference
    from lmrepair.measure import verify as check
    from lmrepair.patch import Patch

    loaded, text = Patch.load(patch), read_reference(reference)
    net = load_net(model, device, dtype_of(dtype, loaded), seed, trust)
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


def show(patch: PatchFile, as_json: Json = False) -> None:
    """Say what is in a patch file, after checking it."""
    from lmrepair.patch import Patch

    data = patch_data(Patch.load(patch))
    show_result(data, patch_text(data), as_json)
