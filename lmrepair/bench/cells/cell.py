"""Measure one cell of a bench: repair, then read effect, cost and side effects, failure by failure.

Everything a figure is made from is kept raw: token ids and texts, ranks and gaps, generations. The same
cell on the same kind of machine gives the same record, but for times and memory. Rows that an earlier run has
measured on the same kind of machine, with the same versions, are kept as they are.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from lmrepair.bench.cells.in_turn import cumulative
from lmrepair.bench.cells.inputs import Rows, read_drift_text, read_rows, statistics_for
from lmrepair.bench.cells.records import (
    DIGITS,
    cost_data,
    effect_data,
    failure_data,
    grid_data,
    heldout_change,
    heldout_data,
    outcome_data,
    patch_data,
    point_data,
)
from lmrepair.bench.grid_file import Cell, Job
from lmrepair.bench.machine import Peak, machine, versions
from lmrepair.failures import Failure, Reference
from lmrepair.loop import Repair, drawn_wordings, repair, repair_each
from lmrepair.measure import (
    Answer,
    Edit,
    SideEffects,
    answers,
    effect,
    grid_effects,
    measure_drift,
    neighbours,
    plain,
    probes,
    side_effects,
)
from lmrepair.methods import Method
from lmrepair.model import Net, Statistics, load
from lmrepair.patch import Patch

HELD = 1 << 30  # bytes of patches held in memory before their drift is measured


class _Untouched:
    """An edit that changes nothing: what an attempt without a patch left."""

    def on(self, _: Net) -> AbstractContextManager[None]:
        return nullcontext()


def measure(job: Job) -> dict[str, Any]:
    """The record of a cell: ``machine``, ``versions``, ``seconds``, and what its study measured.

    Raises what its parts raise; the net is loaded anew for every cell, so nothing is left behind.
    """
    cell = job.cell
    began = time.perf_counter()
    if job.threads:
        torch.set_num_threads(job.threads)
    torch.manual_seed(cell.seed)
    net = load(job.model_source(), device=job.device, dtype=cell.model.dtype)
    references = [read_drift_text(net, spec, job) for spec in cell.drift]
    rows = read_rows(net, job)
    made_on = {"machine": machine(net.device), "versions": versions()}
    known = job.known if all(job.known.get(key) == value for key, value in made_on.items()) else {}
    study = _Study(net, cell, rows, references, statistics_for(net, job, rows.failing), known)
    found = study.run()
    earlier = study.known.get("seconds", 0.0)
    return {
        "model": {"name": cell.model.name, "parameters": sum(p.numel() for p in net.model.parameters())},
        **made_on,
        **plain(found, DIGITS),
        "seconds": round(earlier + time.perf_counter() - began, 2),
    }


class _Study:
    """One cell under measurement: what is read once of the untouched net, and the study's records."""

    def __init__(
        self,
        net: Net,
        cell: Cell,
        rows: Rows,
        references: Sequence[Reference],
        statistics: Statistics | None,
        known: Mapping[str, Any],
    ) -> None:
        self.known = known  # an earlier run's record of the first rows
        self.net, self.cell, self.rows, self.references, self.statistics = net, cell, rows, references, statistics
        self.method = cell.method.build(cell.targeting, cell.seed)
        prefixes = cell.method.prefixes
        self.wordings = drawn_wordings(net, False, prefixes, cell.seed) if prefixes else None

    def run(self) -> dict[str, Any]:
        """The study's part of the record."""
        if self.method is not None and self.cell.study == "cumulative":
            return self._cumulative(self.method)
        self.held = heldout_data(self.net, answers(self.net, self.rows.heldout, generate=False))
        if self.known and self.known["heldout"] != json.loads(json.dumps(plain(self.held, DIGITS))):
            self.known = {}  # other rows are held out, or the untouched model says something else here
        known: list[dict[str, Any]] = self.known.get("failures", [])
        self.failing = self.rows.failing[len(known) :]
        self.before = answers(self.net, self.failing)
        if self.rows.grid:
            self.cells = answers(self.net, self.rows.grid.cells, generate=False)
        if self.method is None:
            found: dict[str, Any] = {"failures": known + self._prompted()}
        elif self.cell.study == "together":
            found = self._together(self.method)
        else:
            found = {"failures": known + self._alone(self.method)}
        return {"heldout": self.held, **found}

    def _prompted(self) -> list[dict[str, Any]]:
        """The yardstick: the solved failure is put before the prompt, and the weights stay as they are."""
        found = []
        for row, before in zip(self.failing, self.before, strict=True):
            began = time.perf_counter()
            (after,) = answers(self.net, solved_before([row], row))
            cost = {"seconds": time.perf_counter() - began, "steps": 0}
            held = answers(self.net, solved_before(self.rows.heldout, row), generate=False)
            record = failure_data(self.net, row, before, after, "") | {"cost": cost}
            record |= heldout_change(self.held, heldout_data(self.net, held))
            found.append(record | side_data(prompted_effects(self.net, row, self.rows.all, self.cell)))
        return found

    def _alone(self, method: Method) -> list[dict[str, Any]]:
        """Every failure from the untouched net (the protocol of arXiv 2503.12899)."""
        found: list[dict[str, Any]] = []
        held: list[tuple[dict[str, Any], Patch]] = []
        size = 0
        made = repair_each(self.net, self.failing, method, statistics=self.statistics, wordings=self.wordings)
        peak = Peak(self.net.device)
        for row, before in zip(self.failing, self.before, strict=True):
            torch.manual_seed(self.cell.seed)
            peak.start()
            one = next(made)
            record = self._repaired(row, before, one, peak.read())
            found.append(record)
            if one.patch is not None:
                held.append((record, one.patch))
                size += record["patch"]["bytes"]
            if size > HELD:
                self._drifts(held)
                held, size = [], 0
        self._drifts(held)
        return found

    def _repaired(self, row: Failure, before: Answer, one: Repair, memory: int | None) -> dict[str, Any]:
        edit = one.patch or _Untouched()
        with edit.on(self.net):
            (after,) = answers(self.net, [row], drafts=[before.tokens.target])
            held = heldout_data(self.net, answers(self.net, self.rows.heldout, generate=False))
        record = failure_data(self.net, row, before, after, one.outcomes[0].reason)
        record |= {"cost": cost_data(one, memory), "patch": patch_data(self.net, one.patch)}
        record |= heldout_change(self.held, held)
        if self.rows.grid:
            place = divmod(self.rows.grid.cells.index(row), len(self.rows.grid.wordings))
            return record | {"grid": grid_data(grid_effects(self.net, self.rows.grid, edit, place, self.cells))}
        return record | side_data(self._side_effects(edit, [row]))

    def _together(self, method: Method) -> dict[str, Any]:
        """All failures in one patch."""
        peak = Peak(self.net.device)
        peak.start()
        shortest = min(self.references, key=_size, default=None)
        joint = repair(self.net, self.failing, method, shortest, statistics=self.statistics, wordings=self.wordings)
        memory = peak.read()
        if joint.patch is not None:
            joint.patch.revert(self.net)
        edit = joint.patch or _Untouched()
        with edit.on(self.net):
            after = answers(self.net, self.failing, drafts=[item.tokens.target for item in self.before])
            held = heldout_data(self.net, answers(self.net, self.rows.heldout, generate=False))
        records = [
            failure_data(self.net, row, old, new, outcome.reason)
            for row, old, new, outcome in zip(self.failing, self.before, after, joint.outcomes, strict=True)
        ]
        whole = {"cost": cost_data(joint, memory), "patch": patch_data(self.net, joint.patch)}
        whole |= heldout_change(self.held, held) | side_data(self._side_effects(edit, self.failing))
        self._drifts([(whole, edit)])
        return {"failures": records, "together": whole}

    def _cumulative(self, method: Method) -> dict[str, Any]:
        """Repairs one after another, and in one joint solve beside them where the method can."""
        done = cumulative(
            self.net,
            self.rows.failing,
            method,
            self.rows.heldout,
            self.references,
            self.cell.measures.every,
            joint=method.mode == "multi-failure" and len(self.rows.failing) <= self.cell.measures.joint,
            texts=True,
            statistics=self.statistics,
        )
        return {
            "failures": [outcome_data(self.net, outcome) for outcome in done.outcomes],
            "curve": [point_data(point) for point in (done.start, *done.points)],
            "joint": point_data(done.joint) if done.joint else None,
        }

    def _side_effects(self, edit: Edit, failures: Sequence[Failure]) -> SideEffects:
        return side_effects(self.net, edit, failures, self.rows.all, self.cell.measures.neighbours)

    def _drifts(self, held: Sequence[tuple[dict[str, Any], Edit]]) -> None:
        """Write the drift of patches, kind by kind, into their records."""
        for reference in self.references if held else ():
            drifts = measure_drift(self.net, [patch for _, patch in held], reference)
            for (record, _), drift in zip(held, drifts, strict=True):
                record.setdefault("drift", {})[reference.name.split("@")[0]] = plain(drift)


def _size(reference: Reference) -> int:
    return sum(map(len, reference.texts))


def side_data(found: SideEffects) -> dict[str, Any]:
    return {
        "generalisation": {kind: effect_data(one) for kind, one in found.generalisation.items()},
        "specificity": effect_data(found.specificity) if found.specificity else None,
    }


def solved_before(rows: Sequence[Failure], example: Failure) -> list[Failure]:
    """The rows with a solved example before their prompt (or their messages)."""
    if example.messages:
        turns = example.answered()
        return [replace(row, messages=(*turns, *row.messages)) if row.messages else row for row in rows]
    lead = example.prompt + example.target + ("" if example.target.endswith("\n") else "\n")
    return [
        replace(
            row,
            prompt=lead + row.prompt,
            paraphrases=tuple(lead + text for text in row.paraphrases if isinstance(text, str)),
        )
        for row in rows
    ]


def prompted_effects(net: Net, failure: Failure, pool: Sequence[Failure], cell: Cell) -> SideEffects:
    """The side effects of the prompt yardstick: the same probes and neighbours, with the solved failure before them."""

    def compare(rows: Sequence[Failure], generate: bool) -> Any:
        before = answers(net, rows, generate)
        after = answers(net, solved_before(rows, failure), generate)
        return effect(before, [replace(new, tokens=old.tokens) for old, new in zip(before, after, strict=True)])

    example = next((row for row in pool if row.target.strip() != failure.target.strip()), None)
    kinds = {kind: rows for kind, rows in probes(failure, example).items() if rows}
    near = neighbours(failure, pool, cell.measures.neighbours)
    generalisation = {kind: compare(rows, False) for kind, rows in kinds.items()}
    return SideEffects(generalisation, compare(near, True) if near else None, 0)
