"""The commands of a study: ``bench`` measures the cells of a grid, ``report`` makes a page of them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from lmrepair.bench import read_grid
from lmrepair.cli.options import Device, Json
from lmrepair.cli.output import say, say_json
from lmrepair.errors import UsageError
from lmrepair.measure import visible

GridToml = Annotated[Path, typer.Argument(metavar="GRID.toml", help="The grid of cells (docs/bench.md).")]
Results = Annotated[Path, typer.Option("--output", help="Folder of the results, one JSON file a cell.")]
Models = Annotated[Path | None, typer.Option(help="Folder that the grid's models lie in; left out: beside the grid.")]
Data = Annotated[Path | None, typer.Option(help="Folder that the grid's data files lie in; left out: beside the grid.")]
Jobs = Annotated[int, typer.Option(min=1, help="Cells at a time: processes, or actors on the cluster.")]
Executor = Annotated[str, typer.Option(help="local, or ray: the cluster that RAY_ADDRESS names, or one started here.")]
Threads = Annotated[int, typer.Option(min=0, help="Threads of each job; 0: the machine's processors shared out.")]
Only = Annotated[str | None, typer.Option(metavar="TEXT", help="Only cells that have this in their name.")]
Again = Annotated[bool, typer.Option("--again", help="Measure cells that are done once more.")]
Found = Annotated[
    Path, typer.Argument(metavar="RESULTS", help="The folder of a bench; what fix --json printed, or a folder of such.")
]
Html = Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")]
Views = Annotated[int, typer.Option(min=0, help="Failures shown token by token, for each model and task.")]


def bench(
    grid: GridToml,
    output: Results,
    models: Models = None,
    data: Data = None,
    jobs: Jobs = 1,
    executor: Executor = "local",
    device: Device = "auto",
    threads: Threads = 0,
    only: Only = None,
    again: Again = False,
    as_json: Json = False,
) -> None:
    """Measure the cells of a grid: models × data × methods × targeting × seeds. Cells that are done are skipped."""
    cells = read_grid(grid)
    if output.exists() and not output.is_dir():
        raise UsageError(f"{visible(str(output), None)} is a file; expected the folder for one JSON file a cell")
    from lmrepair.bench import bench as run, plan

    beside = grid.absolute().parent
    share = threads or max(1, (os.cpu_count() or 1) // jobs)
    planned = plan(
        cells, output, (models or beside).absolute(), (data or beside).absolute(), device, share, only, again
    )
    summary = run(
        cells, planned, jobs, executor, lambda line: say(visible(line, None), sys.stderr if as_json else None)
    )
    if as_json:
        failed = [{"cell": name, "error": error} for name, error in summary.failed]
        say_json({"run": summary.run, "skipped": summary.skipped, "failed": failed})
    elif summary.failed:
        say(f"{len(summary.failed)} of {summary.run} cells failed; run the same command to try them again")
    raise typer.Exit(1 if summary.failed else 0)


def report(results: Found, output: Html = Path("report.html"), views: Views = 20, as_json: Json = False) -> None:
    """Make one self-contained HTML page of the results of ``bench`` or of ``fix``."""
    from lmrepair.bench.report import write_report

    count = write_report(results, output, views)
    if as_json:
        say_json({"results": count, "output": str(output), "bytes": output.stat().st_size})
    else:
        say(f"{count} results → {visible(str(output), None)}")
