"""The census as a record, and as a table between two marks of a page. Imports no model code."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

START, END = "<!-- census: made by benchmarks/census/census.py -->", "<!-- census: end -->"
METHODS = ("star", "minkl")
FAR = 0.05  # share by which the loss may move otherwise than predicted

Row = Mapping[str, Any]


def record(rows: Sequence[Row], seconds: float) -> dict[str, Any]:
    """All rows with the counts, and what they were made with."""
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {"counts": counts(rows), "seconds": round(seconds), "versions": versions, "rows": list(rows)}


def counts(rows: Sequence[Row]) -> dict[str, int]:
    """How many classes came how far; those with experts once more."""
    found = {}
    for name, some in (("", rows), ("mixtures ", [row for row in rows if "mixture" in row.get("traits", ())])):
        found |= {f"{name}{what}": sum(map(held, some)) for what, held in STATES.items()}
    return found


def _placed(row: Row) -> bool:
    return "places" in row


def _of(row: Row, method: str, fact: str) -> Any:
    return row.get(method, {}).get(fact)


def _repaired(row: Row, method: str) -> bool:
    return bool(_of(row, method, "repaired"))


STATES: Mapping[str, Any] = {
    "classes": lambda _: True,
    "built": lambda row: "class" in row,
    "placed": _placed,
    "proved again": lambda row: _placed(row) and row.get("off", FAR) < FAR,
    "repaired by STAR": lambda row: _repaired(row, "star"),
    "repaired by minkl": lambda row: _repaired(row, "minkl"),
    "repaired by both": lambda row: all(_repaired(row, method) for method in METHODS),
    "nothing else written": lambda row: _placed(row) and not any(_of(row, method, "elsewhere") for method in METHODS),
    "taken back bit for bit": lambda row: all(_of(row, method, "reverted") for method in METHODS),
    "refused": lambda row: "refused" in row,
    "neither": lambda row: "class" in row and "error" in row,
}


def table(data: Mapping[str, Any]) -> str:
    """The record as Markdown: counts, what was placed, what was refused by reason, what could not be tried."""
    rows: Sequence[Row] = data["rows"]
    number = data["counts"]
    made = ", ".join(f"{name} {text}" for name, text in data["versions"].items())
    lines = [f"Made with {made}.", "", "| | all | mixtures of experts |", "|---|---|---|"]
    lines += [f"| {what} | {number[what]} | {number[f'mixtures {what}']} |" for what in STATES]
    lines += ["", "| type | written to | layers | | STAR: steps, KL | minkl: steps, KL |", "|---|---|---|---|---|---|"]
    lines += [_line(row) for row in rows if _placed(row)]
    lines += ["", "| refused because | types |", "|---|---|"]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if "refused" in row:
            reasons.setdefault(reason(row["refused"]), []).append(f"`{row['kind']}`")
    ordered = sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0]))
    lines += [f"| {text} | {len(kinds)}: {', '.join(kinds)} |" for text, kinds in ordered]
    failed = [row for row in rows if "error" in row]
    if failed:
        lines += ["", "| not tried to the end | what was said |", "|---|---|"]
        lines += [f"| `{row['kind']}` | {_cell(row['error'])} |" for row in failed]
    return "\n".join(lines)


def _line(row: Row) -> str:
    marks = [*row["traits"], *(["**not as predicted**"] if row.get("off", FAR) >= FAR else [])]
    done = [_done(row.get(method, {})) for method in METHODS]
    places = ", ".join(f"`{place}`" for place in row["places"])
    return f"| `{row['kind']}` | {places} | {row['layers']} | {', '.join(marks)} | {' | '.join(done)} |"


def _done(found: Row) -> str:
    if not found:
        return "—"
    back = "" if found["reverted"] else ", **not taken back**"
    if not found["repaired"]:
        return f"no: {_cell(found['reason'].split(';')[0])}{back}"
    return f"{found['steps']}, {found['kl']:.2g}{back}"


def reason(text: str) -> str:
    """A refusal without what is one model's own: names of its parts, numbers."""
    text = re.sub(r"\([^()]*\)", "", text.split("; expected")[0].split(". Mixtures")[0])
    text = re.sub(r"\b[\w]+(\.\w+)+\b", "…", text)
    return _cell(re.sub(r"\b\d+\b", "n", text))


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())[:200]


def written(page: str, shown: str) -> str:
    """The page with the table between its marks. Raises ValueError for a page without them."""
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"the page has no place for the table; expected {START} and {END}")
    return f"{before}{START}\n\n{shown}\n\n{END}{after}"
