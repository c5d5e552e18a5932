"""What a cell reads before anything is repaired: its rows, its reference text, and statistics of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lmrepair.bench.grid_file import EMBEDDED, DataSpec, DriftSpec, Job
from lmrepair.bench.standing import data_of
from lmrepair.diagnosis import first_failing
from lmrepair.errors import FailuresError
from lmrepair.failures import Failure, Reference, named, read_failures, read_kept, read_kinds, read_reference
from lmrepair.measure import Grid, read_grid
from lmrepair.model import WINDOW, Net, Statistics, statistics_of

SHORTEST = 32  # tokens that are read of each reference text, at least


@dataclass(frozen=True)
class Rows:
    """The rows of a cell: the failures to repair, all rows of their file, and held-out rows of the task."""

    failing: list[Failure]
    all: list[Failure]
    heldout: list[Failure]
    grid: Grid | None = None


def read_drift_text(net: Net, spec: DriftSpec, job: Job) -> Reference:
    """Reference text of one kind (its rows, where a file has several), as short as the cell asks for."""
    path = None if spec.file == EMBEDDED else job.data / spec.file
    if spec.template:
        return _answered(net, spec, job.data_file(spec.file, "failures.jsonl"))
    kinds = [one for one in read_kinds(path) if one.name.split("@")[0] == spec.kind]
    whole = kinds[0] if kinds else read_reference(path, spec.kind)
    length = min(WINDOW, max(SHORTEST, spec.tokens // len(whole.texts)))
    texts = []
    for text in whole.texts[: max(1, spec.tokens // length)]:
        ids = net.tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"][: length - 1]
        texts.append(str(net.tokenizer.decode(ids, clean_up_tokenization_spaces=False)))
    return replace(whole, texts=tuple(texts))


def statistics_for(net: Net, job: Job, failing: Sequence[Failure]) -> Statistics | None:
    """What the method knows of reference text, where the grid gives it more than the model's own."""
    spec = job.cell.method
    method = spec.build(job.cell.targeting, job.cell.seed)
    asked = method.asks() if method is not None else None
    if asked is None or (spec.statistics is None and spec.own_texts is None):
        return None
    path = job.data_file(spec.statistics, "reference.jsonl") if spec.statistics else None
    alike = asked.alike(failing) if spec.own_texts else None
    return statistics_of(net, asked, read_kept(path, job.cell.data.template) if path else alike, own=spec.own_texts)


def _answered(net: Net, spec: DriftSpec, path: Path) -> Reference:
    """Rows of a task, each with its answer, as reference text: the first that make up the tokens asked for."""
    texts, left = [], spec.tokens
    for row in read_failures(path, spec.template):
        texts.append(row.prompt + row.target)
        left -= len(net.tokenizer(texts[-1], verbose=False)["input_ids"])
        if left <= 0:
            break
    return named(spec.kind, texts)


def read_rows(net: Net, job: Job) -> Rows:
    """The rows of a cell: those on which the net makes a mistake are found here. Raises FailuresError for none."""
    cell, spec = job.cell, job.cell.data
    path = data_of(job)
    grid = read_grid(path) if spec.format == "grid" else None
    everything = list(grid.cells) if grid else task_rows(spec, path)
    if grid:
        failing = _failing(net, everything, len(everything), spec.file)
        count = min(cell.failing or len(failing), len(failing))
        return Rows([failing[at * len(failing) // count] for at in range(count)], everything, [], grid)
    candidates = everything
    if cell.study in ("together", "cumulative"):
        # No one model can give two targets for one prompt: of such rows the first is repaired.
        candidates = list({_asked(row): row for row in reversed(everything)}.values())[::-1]
    failing = _failing(net, candidates, cell.failing or len(everything), spec.file)
    source = everything if spec.heldout is None else task_rows(spec, job.data / spec.heldout)
    asked = {_asked(row) for row in failing}
    heldout = [row for row in source if _asked(row) not in asked]
    return Rows(failing, everything, heldout[: cell.measures.heldout])


def task_rows(spec: DataSpec, path: Path) -> list[Failure]:
    return read_failures(path, spec.template, None, spec.chat, spec.end_turn)


def _failing(net: Net, rows: Sequence[Failure], most: int, file: str) -> list[Failure]:
    failing = first_failing(net, rows, most)
    if not failing:
        raise FailuresError(f"{file}: the model makes no mistake on any of its {len(rows)} rows")
    return failing


def _asked(row: Failure) -> str:
    return row.shown
