"""The command line: each command parses, calls one function, prints.

torch and transformers take seconds to import, so the handlers import what needs them; ``--help`` does not.
Exit status: 0 all repaired or verified, 1 something is not, 2 bad usage or input (one line on standard error).
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from lmrepair.cli.faults import INTERRUPTED, guarded
from lmrepair.cli.fix import check, fix
from lmrepair.cli.measuring import doctor, evaluate, show, verify
from lmrepair.cli.options import Device, Json, with_options
from lmrepair.cli.output import say, show_result
from lmrepair.cli.patches import apply, bisect, compose, conflicts, diff, export, push, revert
from lmrepair.cli.repairing import diagnose, repair
from lmrepair.cli.study import bench, report
from lmrepair.model import keep_blocks_apart

app = typer.Typer(
    name="lmrepair",
    help="Repair language models the way engineers repair programs: failures in, a verified, reversible patch out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DEBUG = "--debug"
# Threads that wait for others sleep instead of spinning: beside another busy process, spinning takes the processor
# from the very thread that is waited for. OpenMP reads it when torch is imported; what the user has set stays.
PATIENT = {"OMP_WAIT_POLICY": "PASSIVE"}
# Objects made before garbage is looked for. Importing torch and transformers makes some hundred thousands that stay;
# to look through them again and again took 1.5 s, and to do so once more at the end as long.
SELDOM = 100_000


def main() -> None:
    """Run the command line; whatever goes wrong is one line on standard error."""
    for name, value in PATIENT.items():
        os.environ.setdefault(name, value)
    keep_blocks_apart()
    gc.set_threshold(SELDOM)
    atexit.register(gc.freeze)
    given = sys.argv[1:]
    arguments = [argument for argument in given if argument != DEBUG]
    sys.exit(guarded(lambda: _run(arguments), debug=len(arguments) < len(given)))


def _run(arguments: Sequence[str]) -> int:
    try:
        code = app(list(arguments), standalone_mode=False)
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # typer's own word for a closed pipe is status 1
            raise error.__context__ from None
        raise
    if code == INTERRUPTED:  # typer's own word for Ctrl-C
        raise KeyboardInterrupt
    return int(code or 0)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="Show where an error came from.")] = False,  # noqa: ARG001
) -> None:
    if version:
        from importlib.metadata import version as installed

        say(f"lmrepair {installed('lmrepair')}")
        raise typer.Exit


@app.command()
def demo(device: Device = "auto", as_json: Json = False) -> None:
    """Show the whole way on the model that ships: find mistakes, repair, verify, take back."""
    from lmrepair.cli.demo import run_demo

    data = run_demo(device, (lambda _: None) if as_json else say)
    if as_json:
        show_result(data, [], as_json)
    raise typer.Exit(0 if data["verified"] and data["restored"] else 1)


for command in (
    diagnose,
    repair,
    doctor,
    evaluate,
    verify,
    show,
    check,
    fix,
    apply,
    revert,
    export,
    push,
    compose,
    diff,
    conflicts,
    bisect,
    bench,
    report,
):
    app.command()(with_options(command))
