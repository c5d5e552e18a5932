"""The bench: run the cells of a grid that are not done yet, one JSON file a cell.

A file says what it was made from; a cell whose file is there, done, and made from the same is skipped.
Files appear whole, so a killed bench goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lmrepair.bench.grid_file import EMBEDDED, BenchGrid, Cell, Job
from lmrepair.bench.workers import Ended, Processes, RayActors, Work, Workers, error_data
from lmrepair.errors import FailuresError, UsageError
from lmrepair.failures import write_atomically

FORMAT = 1
MANY = 1 << 30
ATTEMPTS = 3  # at a cell whose worker dies
EXECUTORS = ("local", "ray")


@dataclass(frozen=True)
class Planned:
    """A cell, the job that measures it, its file, what it is made from, and where it stands.

    ``state``: "done", or why it is to be run: "new", "stale" (made from something else), "failed" the
    last time, "damaged", "to be repeated". ``order`` is the cell's place in the grid, ``weight`` how many
    failures it may hold.
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
        return _digest({"format": FORMAT, "config": self.config, "inputs": self.inputs})


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
        file, config, inputs = output / f"{cell.name}.json", cell.config(), _inputs(job, hashed)
        weight = min(cell.failing or MANY, _lines(_data(job)))
        fresh = Planned(job, order, file, config, inputs, weight, "new")
        found.append(replace(fresh, state=_state(file, fresh.digest, again)))
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
    dies is tried ATTEMPTS times; the others go on.
    """
    todo = [item for item in planned if item.state != "done"]
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
    from lmrepair.bench.cell import measure

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
    text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    write_atomically(item.file, text.encode("utf-8", "backslashreplace") + b"\n")
    return f"{error['type']}: {error['message']}" if error else ""


def _state(file: Path, digest: str, again: bool) -> str:
    try:
        record = json.loads(file.read_bytes())
    except FileNotFoundError:
        return "new"
    except (OSError, ValueError, RecursionError):
        return "damaged"
    if not isinstance(record, dict) or record.get("status") not in ("done", "failed"):
        return "damaged"
    if record.get("digest") != digest:
        return "stale"
    return "to be repeated" if again and record["status"] == "done" else str(record["status"])


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


def _inputs(job: Job, hashed: dict[Path, str]) -> dict[str, str]:
    """SHA-256 of what a cell reads: data files and the model's folder (not of a hub model: there its name says)."""
    cell = job.cell
    found = {"data": _data(job)}
    if cell.data.heldout:
        found["heldout"] = job.data / cell.data.heldout
    if cell.method.statistics:
        found["statistics"] = job.data_file(cell.method.statistics, "reference.jsonl")
    for spec in cell.drift:
        found[f"drift {spec.kind}"] = job.data_file(spec.file, "reference.jsonl")
    made = {}
    for name, path in found.items():
        if not path.is_file():
            raise FailuresError(f"{path}: no such file; the grid's files are looked for beside it, or below --data")
        made[name] = _hashed(path, hashed)
    source = job.model_source()
    folder = Path(source) if source else job.data_file(EMBEDDED, "model")
    if folder.is_dir():
        parts = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".txt", ".model"))
        made["model"] = _digest([[path.name, _hashed(path, hashed)] for path in parts])
    elif folder.is_file():
        made["model"] = _hashed(folder, hashed)
    return made


def _data(job: Job) -> Path:
    return job.data_file(job.cell.data.file, f"{job.cell.data.format}.jsonl")


def _lines(path: Path) -> int:
    return max(1, path.read_bytes().count(b"\n"))


def _hashed(path: Path, hashed: dict[Path, str]) -> str:
    if path not in hashed:
        with path.open("rb") as file:
            hashed[path] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashed[path]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
