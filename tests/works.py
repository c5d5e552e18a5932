"""Stand-ins for what a bench's workers do. Imports no torch, so that a worker is there at once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any


def quick(job: Any) -> dict[str, Any]:
    return {"pid": os.getpid(), "failures": []}


def whole(job: Any) -> dict[str, Any]:
    """A record of as many rows as are asked for."""
    rows = [{"id": str(at)} for at in range(job.cell.failing)]
    return {"failures": rows, "heldout": None, "machine": {}, "versions": {}, "seconds": 1.0}


def slow(job: Any) -> dict[str, Any]:
    """The first method's cells are quick, the others' last longer than any test; a mark says which have begun."""
    (job.data / f"{job.cell.name}.begun").write_text(str(os.getpid()), encoding="ascii")
    if job.cell.method.name != "star":
        time.sleep(600)
    return quick(job)


def broken(job: Any) -> dict[str, Any]:
    """The first method's cells raise what nobody expected."""
    if job.cell.method.name == "star":
        return {"found": {}[str(job.models / "secret")]}
    return quick(job)


def dying(job: Any) -> dict[str, Any]:
    """One cell kills its worker whenever it is tried, another the first time only."""
    mark = Path(job.data) / f"{job.cell.name}.tried"
    first = not mark.exists()
    with mark.open("a", encoding="ascii") as file:
        file.write("x")
    if job.cell.method.name == "star" or (job.cell.method.name == "sgd" and first):
        os.kill(os.getpid(), signal.SIGKILL)
    return quick(job)


def dying_once(job: Any) -> dict[str, Any]:
    """The first cell kills its worker once; the prompt's cells are the real thing."""
    mark = Path(job.data) / "killed"
    if not mark.exists():
        mark.write_text(job.cell.name, encoding="utf-8")
        os.kill(os.getpid(), signal.SIGKILL)
    if job.cell.method.name != "prompt":
        return quick(job)
    from lmrepair.bench.cells import measure

    return measure(job)


def bench_on_ray(folder: str) -> None:
    """Run the grid of a folder on a Ray cluster of this process; print what the bench says, and its summary."""
    import ray

    from lmrepair.bench import bench, plan, read_grid

    os.environ.pop("RAY_ADDRESS", None)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    at = Path(folder)
    grid = read_grid(at / "grid.toml")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        cells = plan(grid, at / "out", at, at, threads=1)
        print(bench(grid, cells, 1, "ray", lambda line: print(line, flush=True), dying_once), flush=True)
    finally:
        ray.shutdown()
