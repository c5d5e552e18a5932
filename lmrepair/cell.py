"""Measure one cell of a bench: repair, then read effect, cost and side effects, failure by failure.

Everything a figure is made from is kept raw: token ids and texts, ranks and gaps, generations. The same
cell on the same kind of machine gives the same record, but for times and memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lmrepair.diagnosis import diagnose
from lmrepair.drift import Drift, Reference, measure_drift, read_reference
from lmrepair.errors import FailuresError
from lmrepair.evaluation import Answer, answers, decoder, greedy_texts, teacher_texts
from lmrepair.failures import Failure, read_failures
from lmrepair.gridfile import EMBEDDED, Cell, DataSpec
from lmrepair.loading import load
from lmrepair.loop import Repair, repair, repair_each
from lmrepair.machine import Peak, machine, versions
from lmrepair.methods import Method
from lmrepair.metrics import corpus_bleu, text_scores
from lmrepair.net import Net
from lmrepair.patch import Patch

HELD = 1 << 30  # bytes of patches held in memory before their drift is measured
DIGITS = 6

View = Callable[[Sequence[Failure]], list[Failure]]


@dataclass(frozen=True)
class Job:
    """A cell with the folders and the device of the machine that measures it. ``threads`` 0: torch's default."""

    cell: Cell
    models: Path
    data: Path
    device: str = "auto"
    threads: int = 0


@dataclass(frozen=True)
class Rows:
    """The rows of a cell: the failures to repair, all rows of their file, and held-out rows of the task."""

    failing: list[Failure]
    all: list[Failure]
    heldout: list[Failure]


def measure(job: Job) -> dict[str, Any]:
    """The record of a cell: ``machine``, ``versions``, ``seconds``, and what its study measured.

    Raises what its parts raise; nothing of it is left in the net, which is loaded anew for every cell.
    """
    cell = job.cell
    began = time.perf_counter()
    if job.threads:
        torch.set_num_threads(job.threads)
    torch.manual_seed(cell.seed)
    net = load(model_source(job), device=job.device, dtype=cell.model.dtype)
    study = _Study(net, cell, _rows(net, job), references(job))
    found = study.run()
    return {
        "model": {"name": cell.model.name, "parameters": sum(p.numel() for p in net.model.parameters())},
        "machine": machine(net.device),
        "versions": versions(),
        **clean(found),
        "seconds": round(time.perf_counter() - began, 2),
    }


def model_source(job: Job) -> str | None:
    """What ``load`` takes: None for the embedded model, a folder below ``models``, or a hub name."""
    path = job.cell.model.path
    if path == EMBEDDED:
        return None
    return str(job.models / path) if (job.models / path).is_dir() else path


def data_file(job: Job, name: str, embedded: str) -> Path:
    """A file of the grid below ``data``, or the one that ships."""
    if name == EMBEDDED:
        from importlib.resources import files

        return Path(str(files("lmrepair") / "embedded" / embedded))
    return job.data / name


def references(job: Job) -> list[tuple[str, Reference, int]]:
    """(kind, text, tokens to read) for each kind of reference text."""
    found = []
    for spec in job.cell.drift:
        reference = read_reference(None if spec.file == EMBEDDED else job.data / spec.file)
        found.append((spec.kind, reference, spec.tokens))
    return found


def _rows(net: Net, job: Job) -> Rows:
    cell, spec = job.cell, job.cell.data
    everything = _read(job, spec, spec.file)
    found = diagnose(net, everything)
    failing = [row for row, item in zip(everything, found, strict=True) if item.mistakes][: cell.failing]
    if not failing:
        raise FailuresError(f"{spec.file}: the model makes no mistake on any of its {len(everything)} rows")
    if spec.heldout is not None:
        heldout = _read(job, spec, spec.heldout)
    else:
        chosen = {row.id for row in failing}
        heldout = [row for row in everything if row.id not in chosen]
    prompts = {row.prompt for row in failing}
    heldout = [row for row in heldout if row.prompt not in prompts or row.messages]
    return Rows(failing, everything, heldout[: cell.measures.heldout])


def _read(job: Job, spec: DataSpec, name: str) -> list[Failure]:
    return read_failures(data_file(job, name, "failures.jsonl"), spec.template)


class _Study:
    """One cell under measurement: what is read once of the untouched net, and the study's records."""

    def __init__(self, net: Net, cell: Cell, rows: Rows, texts: list[tuple[str, Reference, int]]) -> None:
        self.net, self.cell, self.rows, self.texts = net, cell, rows, texts
        self.before = answers(net, rows.failing)
        self.held = answers(net, rows.heldout, generate=False)

    def run(self) -> dict[str, Any]:
        method = self.cell.method.build(self.cell.targeting, self.cell.seed)
        if method is None:
            found = {"failures": self._prompted()}
        elif self.cell.study == "together":
            found = self._together(method)
        else:
            found = {"failures": self._alone(method)}
        return {**found, "heldout": heldout_data(self.net, self.held)}

    def _prompted(self) -> list[dict[str, Any]]:
        """The yardstick: the solved failure is put before the prompt, and the weights stay as they are."""
        found = []
        for row, before in zip(self.rows.failing, self.before, strict=True):
            began = time.perf_counter()
            (after,) = answers(self.net, solved_before([row], row))
            seconds = time.perf_counter() - began
            record = self._record(row, before, after, "")
            record["cost"] = {"seconds": seconds, "forward_equivalents": None, "check_seconds": 0.0, "steps": 0}
            found.append({**record, **self._side(lambda rows, row=row: solved_before(rows, row))})
        return found

    def _alone(self, method: Method) -> list[dict[str, Any]]:
        """Every failure from the untouched net (the protocol of arXiv 2503.12899)."""
        found: list[dict[str, Any]] = []
        held: list[tuple[dict[str, Any], Patch]] = []
        made = iter(repair_each(self.net, self.rows.failing, method))
        peak = Peak(self.net.device)
        for row, before in zip(self.rows.failing, self.before, strict=True):
            torch.manual_seed(self.cell.seed)
            peak.start()
            one = next(made)
            memory = peak.read()
            with patched(self.net, one.patch):
                (after,) = answers(self.net, [row])
                record = self._record(row, before, after, one.outcomes[0].reason)
                record |= {"cost": cost_data(one, memory), "patch": patch_data(self.net, one.patch)}
                record |= self._side(list)
            found.append(record)
            if one.patch is not None:
                held.append((record, one.patch))
            if sum(patch.size for _, patch in held) > HELD:
                held = self._drifts(held)
        self._drifts(held)
        return found

    def _together(self, method: Method) -> dict[str, Any]:
        """All failures in one patch."""
        peak = Peak(self.net.device)
        peak.start()
        joint = repair(self.net, self.rows.failing, method)
        memory = peak.read()
        records = []
        after = answers(self.net, self.rows.failing)
        for row, old, new, outcome in zip(self.rows.failing, self.before, after, joint.outcomes, strict=True):
            records.append(self._record(row, old, new, outcome.reason))
        side = self._side(list)
        whole = {"cost": cost_data(joint, memory), "patch": patch_data(self.net, joint.patch), **side}
        if joint.patch is not None:
            joint.patch.revert(self.net)
            self._drifts([(whole, joint.patch)])
        return {"failures": records, "together": whole}

    def _record(self, row: Failure, before: Answer, after: Answer, reason: str) -> dict[str, Any]:
        decode = decoder(self.net)
        greedy = after.written == after.tokens.target
        return {
            "id": row.id,
            "prompt": row.prompt or str([dict(message) for message in row.messages]),
            "target": row.target,
            "tokens": [[token, decode([token])] for token in before.tokens.target],
            "repaired": after.match == 1.0 and greedy,
            "reason": reason,
            "before": answer_data(self.net, before),
            "after": answer_data(self.net, after),
        }

    def _side(self, view: View) -> dict[str, Any]:
        """Held-out rows of the task as the net answers them now; ``view`` is how it is asked."""
        after = answers(self.net, view(self.rows.heldout), generate=False)
        return {"heldout": heldout_data(self.net, after, self.held)}

    def _drifts(self, held: Sequence[tuple[dict[str, Any], Patch]]) -> list[tuple[dict[str, Any], Patch]]:
        """Write the drift of patches, kind by kind, into their records; nothing is held any more afterwards."""
        for kind, reference, _ in self.texts:
            drifts = measure_drift(self.net, [patch for _, patch in held], reference) if held else []
            for (record, _), drift in zip(held, drifts, strict=True):
                record.setdefault("drift", {})[kind] = drift_data(drift)
        return []


def patched(net: Net, patch: Patch | None) -> AbstractContextManager[None]:
    """The net with a patch, or as it is where there is none."""
    return nullcontext() if patch is None else patch.on(net)


def solved_before(rows: Sequence[Failure], example: Failure) -> list[Failure]:
    """The rows with a solved example before their prompt (or their messages)."""
    if example.messages:
        turn = (*example.messages, {"role": "assistant", "content": example.target})
        return [replace(row, messages=(*turn, *row.messages)) if row.messages else row for row in rows]
    lead = example.prompt + example.target + ("" if example.target.endswith("\n") else "\n")
    return [
        replace(row, prompt=lead + row.prompt, paraphrases=tuple(lead + text for text in row.paraphrases))
        for row in rows
    ]


def answer_data(net: Net, answer: Answer) -> dict[str, Any]:
    """An answer, raw and scored. What is preferred is the target but for the ``mistakes``: [position, id, text]."""
    decode = decoder(net)
    said = [
        [position, token, decode([token])]
        for position, (token, wanted) in enumerate(zip(answer.preferred, answer.tokens.target, strict=True))
        if token != wanted
    ]
    ((preferred, target),) = teacher_texts(net, [answer])
    found: dict[str, Any] = {
        "mistakes": said,
        "rank": list(answer.rank),
        "gap": [round(gap, 4) for gap in answer.gap],
        "preferred": preferred,
        "teacher": {"token_match": answer.match, **asdict(text_scores(preferred, target))},
    }
    for written, wanted in greedy_texts(net, [answer]):
        found |= {"written_ids": list(answer.written or ()), "written": written}
        found["greedy"] = asdict(text_scores(written, wanted))
    return found


def heldout_data(net: Net, found: Sequence[Answer], before: Sequence[Answer] | None = None) -> dict[str, Any] | None:
    """Held-out rows under teacher forcing: shares, BLEU, and the preferred texts ([row, text]; all, or the changed)."""
    if not found:
        return None
    pairs = teacher_texts(net, found)
    tokens = sum(len(answer.tokens.target) for answer in found)
    return {
        "rows": len(found),
        "token_match": sum(answer.right for answer in found) / tokens,
        "exact_match": statistics.fmean(answer.match == 1.0 for answer in found),
        "bleu": corpus_bleu([text for text, _ in pairs], [target for _, target in pairs]),
        "preferred": [
            [row, text]
            for row, (text, _) in enumerate(pairs)
            if before is None or before[row].preferred != found[row].preferred
        ],
    }


def cost_data(one: Repair, memory: int | None) -> dict[str, Any]:
    return {**asdict(one.cost), "peak_memory": memory}


def patch_data(net: Net, patch: Patch | None) -> dict[str, Any]:
    """How much of the model is changed; ``parameters`` counts the numbers in the changed neurons."""
    if patch is None:
        return {"layers": 0, "neurons": 0, "parameters": 0, "bytes": 0}
    parameters = patch.neurons * net.hidden
    return {"layers": patch.layers, "neurons": patch.neurons, "parameters": parameters, "bytes": patch.size}


def drift_data(drift: Drift) -> dict[str, Any]:
    return asdict(drift)


def clean(value: Any) -> Any:
    """Plain values for JSON: floats to DIGITS significant digits, None for what is no finite number."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if value - value == 0 else None
    if isinstance(value, Mapping):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return value
