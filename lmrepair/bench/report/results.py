"""A folder of cell files read and checked: what the report is made from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmrepair.errors import ResultsError, UsageError
from lmrepair.measure import visible
from lmrepair.methods import Targeting

FORMAT = 1


@dataclass(frozen=True)
class Row:
    """One failure of a cell. ``values``: every number in its record, by its dotted path ("after.teacher.bleu").

    ``tokens`` are the target's texts; ``before`` and ``after``: position → what was said instead.
    """

    id: str
    prompt: str
    target: str
    tokens: tuple[str, ...]
    reason: str
    before: Mapping[int, str]
    after: Mapping[int, str]
    values: Mapping[str, float]


@dataclass(frozen=True)
class Result:
    """One cell, done or failed, as its file says. ``order`` is its place in the grid."""

    name: str
    order: int
    study: str
    model: str
    data: str
    method: str
    base: str
    preset: str | None
    targeting: Mapping[str, str]
    settings: Mapping[str, str]
    seed: int
    error: str = ""
    rows: tuple[Row, ...] = ()
    whole: Mapping[str, float] = field(default_factory=dict)
    curve: tuple[Mapping[str, float], ...] = ()
    machine: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    grid: str = ""

    @property
    def group(self) -> tuple[str, str]:
        return self.model, self.data


def read_results(folder: str | Path) -> list[Result]:
    """All cells of a folder, in the grid's order.

    Raises ResultsError for a folder that is missing or has none, and for a file that is damaged or no cell.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ResultsError(f"{folder}: no such folder; expected the --output of lmrepair bench")
    found = [_read(path) for path in sorted(folder.glob("*.json"))]
    if not found:
        raise ResultsError(f"{folder}: no results in it; expected the JSON files that lmrepair bench writes")
    return sorted(found, key=lambda result: (result.order, result.name))


def _read(path: Path) -> Result:
    try:
        record = json.loads(path.read_bytes())
        return _result(record)
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read ({error.strerror})") from error
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        ArithmeticError,
        RecursionError,
        UsageError,
    ) as error:
        raise ResultsError(
            f"{path}: not a cell this version can read ({type(error).__name__}: {error}); "
            "delete it and run lmrepair bench again, or leave only its files in the folder"
        ) from error


def _result(record: Any) -> Result:
    if record["format"] != FORMAT:
        raise ValueError(f"format {record['format']!r}, this version reads {FORMAT}")
    config, status = record["config"], record["status"]
    if status not in ("done", "failed"):
        raise ValueError(f"status {status!r}, expected done or failed")
    error = record.get("error") or {"type": "", "message": "", "at": ""}
    said = f"{_name(error['type'])}: {_name(error['message'])} {_name(error['at'])}".strip()
    method = config["method"]
    settings = _names(method["settings"])
    Targeting(settings.get("layers", "1"), settings.get("pattern", "even"), settings.get("share", "1")).check()
    curve = tuple(flat(point) for point in record.get("curve", []))
    if any("k" not in point for point in curve):
        raise ValueError("a point of the curve without k")
    return Result(
        name=_name(record["name"]),
        order=int(record.get("order", 0)),
        study=_text(config["study"]),
        model=_name(config["model"]["name"]),
        data=_name(config["data"]["name"]),
        method=_name(method["name"]),
        base=_name(method["method"]),
        preset=method["preset"] if method["preset"] is None else _name(method["preset"]),
        targeting={_name(key): _name(value) for key, value in config["targeting"].items()},
        settings=settings,
        seed=int(config["seed"]),
        error=said if status == "failed" else "",
        rows=tuple(_row(item) for item in record.get("failures", [])),
        whole={**flat(record.get("together") or {}), **flat(record.get("joint") or {}, "joint.")},
        curve=curve,
        machine=_names(record.get("machine", {})),
        versions=_names(record.get("versions", {})),
        seconds=float(record.get("seconds", 0.0)),
        grid=_name(record["grid"]),
    )  # fmt: skip


def _row(item: Mapping[str, Any]) -> Row:
    return Row(
        id=_name(item["id"]),
        prompt=_text(item["prompt"]),
        target=_text(item["target"]),
        tokens=tuple(_text(text) for _, text in item["tokens"]),
        reason=_text(item["reason"]),
        before=_said(item["before"], len(item["tokens"])),
        after=_said(item["after"], len(item["tokens"])),
        values=flat(item),
    )


def _said(answer: Mapping[str, Any], tokens: int) -> dict[int, str]:
    said = {int(position): _text(text) for position, _, text in answer["mistakes"]}
    if any(not 0 <= position < tokens for position in said):
        raise ValueError("a mistake outside the target")
    return said


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers (and truth values) of nested tables by their dotted path; lists and texts are left out."""
    found: dict[str, float] = {}
    for key, item in value.items():
        if isinstance(item, bool | int | float):
            if not math.isfinite(item):
                raise ValueError(f"{prefix}{key} is no finite number")
            found[f"{prefix}{key}"] = float(item)
        elif isinstance(item, Mapping):
            found |= flat(item, f"{prefix}{key}.")
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"found {type(value).__name__}, expected text")
    return value


def _name(value: Any) -> str:
    """Text that stands in a line of its own: what does not print is spelled out."""
    return visible(_text(value), None)


def _names(table: Mapping[str, Any]) -> dict[str, str]:
    return {_name(key): visible(str(value), None) for key, value in table.items()}


def by_group(results: Sequence[Result], study: str) -> Iterator[tuple[tuple[str, str], list[Result]]]:
    """The cells of a study that are done, by model and data."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if result.study == study and not result.error:
            groups.setdefault(result.group, []).append(result)
    yield from groups.items()
