"""The bench: run the cells of a grid that are not done yet, one JSON file a cell.

A file says what it was made from; a cell whose file is there, done, and made from the same is skipped, and one
that holds the first of a cell's rows is extended. Files appear whole, so a killed bench goes on where it was.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lmrepair.bench.grid_file import BenchGrid, Cell, Job
from lmrepair.bench.standing import FORMAT, data_of, inputs_of, made_from, standing
from lmrepair.bench.workers import Ended, Processes, RayActors, Work, Workers, error_data
from lmrepair.errors import UsageError
from lmrepair.failures import write_atomically

MANY = 1 << 30
ATTEMPTS = 3  # at a cell whose worker dies
EXECUTORS = ("local", "ray")


@dataclass(frozen=True)
class Planned:
    """A cell, the job that measures it, its file, what it is made from, and where it stands.

    ``state``: "done", or why it is to be run: "new", "stale" (made from something else), "failed" the
    last time, "damaged", "to be repeated", "to be extended" (its first rows are there; the job knows them).
    ``order`` is the cell's place in the grid, ``weight`` how many failures are to be measured.
    """

    job: Job
    order: int
    file: Path
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    weight: int
    state: str

    @property
    def cell(self) -> Cell:
        return self.job.cell

    @property
    def digest(self) -> str:
        return made_from(self.config, self.inputs)


@dataclass(frozen=True)
class Summary:
    """What a bench did: how many cells it ran, skipped as done, and could not measure (with their errors)."""

    run: int
    skipped: int
    failed: tuple[tuple[str, str], ...]


def plan(
    grid: BenchGrid,
    output: Path,
    models: Path,
    data: Path,
    device: str = "auto",
    threads: int = 0,
    only: str | None = None,
    again: bool = False,
) -> list[Planned]:
    """The cells of a grid with their state in the folder ``output``; ``only``: those with this in their name;
    ``again``: those that are done are to be run once more.

    Raises FailuresError for a data file that is missing, UsageError where no cell is left.
    """
    hashed: dict[Path, str] = {}
    found = []
    for order, cell in enumerate(grid.cells):
        if only is not None and only not in cell.name:
            continue
        job = Job(cell, models, data, device, threads)
        file, config, inputs = output / f"{cell.name}.json", cell.config(), inputs_of(job, hashed)
        state, known = standing(file, config, inputs, again)
        weight = min(cell.failing or MANY, _lines(data_of(job))) - len(known.get("failures", ()))
        found.append(Planned(replace(job, known=known), order, file, config, inputs, max(1, weight), state))
    if not found:
        raise UsageError(f"no cell of {grid.name!r} has {only!r} in its name; cells: {grid.cells[0].name}, …")
    return found


def bench(
    grid: BenchGrid,
    planned: Sequence[Planned],
    jobs: int = 1,
    executor: str = "local",
    say: Callable[[str], None] = lambda _: None,
    work: Work | None = None,
) -> Summary:
    """Run the planned cells that are not done; report progress by lines.

    With the "local" executor ``jobs`` processes, with "ray" as many actors on the cluster that
    RAY_ADDRESS names (or a local one). A cell that fails is recorded with its error, one whose worker
    dies is tried ATTEMPTS times; the others go on. Of cells that are done nothing changes but their place in the
    grid, which reports follow.
    """
    todo = [item for item in planned if item.state != "done"]
    for item in planned:
        if item.state == "done":
            _put_in_place(item)
    queue = deque(todo)
    total = len(todo)
    say(f"{len(planned)} cells: {len(planned) - total} done, {total} to run{_states(todo)}")
    if not todo:
        return Summary(0, len(planned), ())
    clock = _Clock(todo)
    failed: list[tuple[str, str]] = []
    deaths: Counter[str] = Counter()
    by_name = {item.cell.name: item for item in todo}
    workers = _workers(executor, work or _measured, min(jobs, total), todo)
    try:
        while queue or workers.busy:
            while queue and workers.free:
                workers.submit(queue.popleft().job)
            for ended in workers.wait():
                item = by_name[ended.job.cell.name]
                if ended.died:
                    deaths[item.cell.name] += 1
                    if deaths[item.cell.name] < ATTEMPTS:
                        say(f"{item.cell.name}: its worker died; once more")
                        queue.append(item)
                        continue
                error = _write(grid, item, ended)
                if error:
                    failed.append((item.cell.name, error))
                say(clock.line(item, error))
    finally:
        workers.close()
    return Summary(total, len(planned) - total, tuple(failed))


def _measured(job: Job) -> dict[str, Any]:
    """Measure a cell, in a worker: nobody else waits for torch."""
    from lmrepair.bench.cells import measure

    return measure(job)


def _workers(executor: str, work: Work, count: int, planned: Sequence[Planned]) -> Workers:
    if executor == "ray":
        return RayActors(work, count, on_gpu=planned[0].job.device != "cpu")
    if executor == "local":
        return Processes(work, count)
    raise UsageError(f"unknown executor {executor!r}; known: {', '.join(EXECUTORS)}")


def _write(grid: BenchGrid, item: Planned, ended: Ended) -> str:
    """Write a cell's file; the error's text if it failed, else nothing."""
    error = None
    if ended.error is not None:
        error = error_data(ended.error, (item.job.models, item.job.data, Path.cwd(), Path(os.path.expanduser("~"))))
    elif ended.died:
        error = {"type": "WorkerDied", "message": f"its worker died {ATTEMPTS} times (out of memory?)", "at": ""}
    record = {
        "format": FORMAT,
        "name": item.cell.name,
        "grid": grid.name,
        "order": item.order,
        "status": "failed" if error else "done",
        "digest": item.digest,
        "config": item.config,
        "inputs": item.inputs,
        "error": error,
        **(ended.result or {}),
    }
    _write_record(item.file, record)
    return f"{error['type']}: {error['message']}" if error else ""


def _put_in_place(item: Planned) -> None:
    """Give a cell that is done its place in the grid, where studies have come or gone before it."""
    record = json.loads(item.file.read_bytes())
    if record.get("order") != item.order:
        _write_record(item.file, {**record, "order": item.order})


def _write_record(file: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    write_atomically(file, text.encode("utf-8", "backslashreplace") + b"\n")


def _states(todo: Sequence[Planned]) -> str:
    counts = Counter(item.state for item in todo if item.state != "new")
    return f" ({', '.join(f'{count} {state}' for state, count in sorted(counts.items()))})" if counts else ""


class _Clock:
    """Progress with a time estimate: cells weigh as much as the failures that they may hold."""

    def __init__(self, todo: Sequence[Planned]) -> None:
        self._left = {item.cell.name: item.weight for item in todo}
        self._weight = sum(self._left.values())
        self._total = len(todo)
        self._began = time.monotonic()

    def line(self, item: Planned, error: str) -> str:
        del self._left[item.cell.name]
        left = sum(self._left.values())
        elapsed = time.monotonic() - self._began
        rest = elapsed * left / (self._weight - left)
        about = f"about {_span(rest)} left" if left else f"all in {_span(elapsed)}"
        what = f"FAILED: {error}" if error else "done"
        return f"[{self._total - len(self._left)}/{self._total}] {item.cell.name}: {what}; {about}"


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _lines(path: Path) -> int:
    return max(1, path.read_bytes().count(b"\n"))
