"""The commands ``conflicts`` and ``bisect``: which patches will get in each other's way, and which one did."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmrepair.cli.options import Json, LoadOptions, ModelFolder, Wrap
from lmrepair.cli.output import show_result
from lmrepair.cli.patches.common import untouched
from lmrepair.cli.starting import load_net
from lmrepair.errors import UsageError
from lmrepair.measure import visible

if TYPE_CHECKING:
    from lmrepair.model import Net
    from lmrepair.patch import Patch

Several = Annotated[list[Path], typer.Argument(metavar="PATCH...", help="Patches for one untouched model.")]
InOrder = Annotated[
    Path, typer.Option("--patches", metavar="DIR", help="A folder of patches, in order of their names.")
]
Check = Annotated[
    str,
    typer.Option(metavar="FAILURES|COMMAND", help="A file of failures, or a command that gets LMREPAIR_MODEL."),
]
VARIABLE = "LMREPAIR_MODEL"
SKIP, LAST = 125, 127  # exit statuses as git bisect run takes them


def conflicts(patches: Several, *, model: ModelFolder, loading: LoadOptions, as_json: Json = False) -> None:
    """Foretell which patches will break what others repair, before any is applied with another."""
    from lmrepair.patch import Patch, forecasts

    if len(patches) < 2:
        raise UsageError("one patch has no other to conflict with; expected two or more")
    loaded = [Patch.load(path) for path in patches]
    net = untouched(loaded[0], model, loading)
    found = forecasts(net, loaded)
    names = [str(path) for path in patches]
    data = {
        "looked_at": len(found),
        "danger": [
            {
                "patch": names[one.other], "breaks": names[one.owner], "failure": one.failure,
                "margin": one.margin, "foretold": one.foretold,
            }
            for one in found
            if one.danger
        ],
    }  # fmt: skip
    lines = [
        f"✗ {visible(one['patch'], None)} is foretold to break {visible(one['failure'], None)} of "
        f"{visible(one['breaks'], None)}: margin {one['margin']:.2f} → {one['foretold']:.2f}"
        for one in data["danger"]  # type: ignore[attr-defined]
    ]
    lines.append(f"{len(lines)} of {len(found)} repairs in danger, each beside one other patch")
    show_result(data, lines, as_json)
    raise typer.Exit(1 if data["danger"] else 0)


def bisect(
    *,
    model: ModelFolder,
    patches: InOrder,
    check: Check,
    template: Wrap = None,
    loading: LoadOptions,
    as_json: Json = False,
) -> None:
    """Find the first of an ordered list of patches with which a check fails, by halving."""
    from lmrepair.patch import Patch, first_bad

    paths = sorted(patches.glob("*.safetensors"))
    if not paths:
        raise UsageError(f"{patches}: no patches in it; expected a folder with files *.safetensors")
    loaded = [Patch.load(path) for path in paths]
    net = load_net(model, loading.for_patch(loaded[0]))
    good = (
        _failures_check(net, loaded, Path(check), template)
        if Path(check).is_file()
        else _command_check(net, loaded, check)
    )
    at, looked = first_bad(len(loaded), good)
    data: dict[str, Any] = {"first_bad": str(paths[at - 1]), "number": at, "of": len(paths), "looked_at": looked}
    which = f"{at} of {len(paths)}, {len(looked)} states looked at"
    lines = [f"{visible(str(paths[at - 1]), None)} is the first bad patch ({which})"]
    show_result(data, lines, as_json)


def _failures_check(
    net: Net, patches: Sequence[Patch], path: Path, template: str | None
) -> Callable[[int], bool | None]:
    from lmrepair.diagnosis import diagnose
    from lmrepair.failures import read_failures
    from lmrepair.patch import first_patches

    rows = read_failures(path, template)

    def good(count: int) -> bool:
        with first_patches(net, patches[:count]):
            return not any(found.mistakes for found in diagnose(net, rows))

    return good


def _command_check(net: Net, patches: Sequence[Patch], command: str) -> Callable[[int], bool | None]:
    from lmrepair.patch import first_patches, save_model

    words = shlex.split(command)
    if not words:
        raise UsageError("--check is empty; expected a file of failures, or a command")

    def good(count: int) -> bool | None:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "model"
            with first_patches(net, patches[:count]):
                save_model(net, place)
            try:
                code = subprocess.run(words, env={**os.environ, VARIABLE: str(place)}, check=False).returncode
            except OSError as error:
                raise UsageError(f"--check {command!r} does not run ({error.strerror})") from error
        if code == SKIP:
            return None
        if code < 0 or code > LAST:
            raise UsageError(f"--check ended with status {code}; expected 0 (good) or 1 to 127 (bad; 125: skip)")
        return code == 0

    return good
