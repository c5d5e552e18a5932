"""How a cell's file stands: what the cell is made from, and what its file holds of it. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmrepair.bench.grid_file import EMBEDDED, Job
from lmrepair.errors import FailuresError

FORMAT = 1
ROW_BY_ROW = ("alone", "sparsity")  # studies in which no row's figures depend on how many rows there are
STATES = ("done", "failed")
KNOWN = ("failures", "heldout", "machine", "versions", "seconds")


def made_from(config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """SHA-256 of everything a cell is made from."""
    return _digest({"format": FORMAT, "config": config, "inputs": inputs})


def standing(
    file: Path, config: Mapping[str, Any], inputs: Mapping[str, str], again: bool
) -> tuple[str, dict[str, Any]]:
    """The state of a cell's file (``Planned`` names them), and what it holds of a cell that is to be extended."""
    try:
        record = json.loads(file.read_bytes())
    except FileNotFoundError:
        return "new", {}
    except (OSError, ValueError, RecursionError):
        return "damaged", {}
    if not isinstance(record, dict) or record.get("status") not in STATES:
        return "damaged", {}
    if record.get("digest") == made_from(config, inputs):
        return "to be repeated" if again and record["status"] == "done" else str(record["status"]), {}
    if again or not _begins(record, config, inputs):
        return "stale", {}
    return "to be extended", {key: record[key] for key in KNOWN}


def _begins(record: Mapping[str, Any], config: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
    """Whether a record holds the first rows of a cell: whole, made from the same, and asked for fewer."""
    then, now, method = record.get("config"), config["failing"], config["method"]
    if not isinstance(then, dict) or not isinstance(then.get("failing"), int):
        return False
    if now is not None and now <= then["failing"]:
        return False
    if config["study"] not in ROW_BY_ROW or "own_texts" in method:  # statistics gathered for the rows that fail
        return False
    alike = record.get("digest") == made_from({**config, "failing": then["failing"]}, inputs)
    whole = record["status"] == "done" and all(key in record for key in KNOWN)
    return alike and whole and isinstance(record["failures"], list) and len(record["failures"]) <= then["failing"]


def inputs_of(job: Job, hashed: dict[Path, str]) -> dict[str, str]:
    """SHA-256 of what a cell reads: data files and the model's files (not of a hub model: there its name says).

    ``hashed`` keeps what was read already. Raises FailuresError for a data file that is missing.
    """
    cell = job.cell
    found = {"data": data_of(job)}
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


def data_of(job: Job) -> Path:
    """The file of the cell's failures."""
    return job.data_file(job.cell.data.file, f"{job.cell.data.format}.jsonl")


def _hashed(path: Path, hashed: dict[Path, str]) -> str:
    if path not in hashed:
        with path.open("rb") as file:
            hashed[path] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashed[path]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
