"""The grid of side effects: rows share the knowledge asked for, columns share the wording.

Repair one cell, then read the rest of its row, which should improve, and the rest of its column, which
should stay (arXiv 2503.12899).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmrepair.errors import FailuresError, UsageError
from lmrepair.failures import Failure, read_lines, shipped
from lmrepair.measure.answer import Answer, answers
from lmrepair.measure.drift import Edit
from lmrepair.measure.effects import Effect, effect
from lmrepair.model import Net

KEYS = ("knowledge", "wording", "prompt", "target")


@dataclass(frozen=True)
class Grid:
    """Prompts by knowledge (rows) and wording (columns); ``cells`` row by row, all of them there."""

    knowledge: tuple[str, ...]
    wordings: tuple[str, ...]
    cells: tuple[Failure, ...]

    def at(self, g: int, s: int) -> int:
        """The place in ``cells`` of row g, column s, both from 0. Raises UsageError for a cell outside the grid."""
        if not (0 <= g < len(self.knowledge) and 0 <= s < len(self.wordings)):
            size = f"{len(self.knowledge)} × {len(self.wordings)}"
            raise UsageError(f"cell ({g}, {s}) is outside the grid of {size}; rows and columns count from 0")
        return g * len(self.wordings) + s

    def cell(self, g: int, s: int) -> Failure:
        return self.cells[self.at(g, s)]

    def row(self, g: int, s: int) -> list[int]:
        """The places of row g but for column s."""
        return [self.at(g, other) for other in range(len(self.wordings)) if other != s]

    def column(self, g: int, s: int) -> list[int]:
        """The places of column s but for row g."""
        return [self.at(other, s) for other in range(len(self.knowledge)) if other != g]


@dataclass(frozen=True)
class GridEffects:
    """What repairing cell (g, s) did to it, to the rest of its row, of its column, and to all other cells."""

    g: int
    s: int
    cell: Effect
    row: Effect
    column: Effect
    elsewhere: Effect


def grid_effects(
    net: Net, grid: Grid, patch: Edit, place: tuple[int, int], before: Sequence[Answer] | None = None
) -> GridEffects:
    """The effects of a patch that was made for the cell at ``place`` = (g, s).

    ``before`` are the untouched net's answers to ``grid.cells``, where they are known already.
    """
    g, s = place
    at, row, column = grid.at(g, s), grid.row(g, s), grid.column(g, s)
    old = answers(net, grid.cells, generate=False) if before is None else list(before)
    with patch.on(net):
        new = answers(net, [item.tokens for item in old], generate=False)
    near = {at, *row, *column}
    rest = [place for place in range(len(grid.cells)) if place not in near]

    def of(places: Sequence[int]) -> Effect:
        return effect([old[place] for place in places], [new[place] for place in places])

    return GridEffects(g, s, of([at]), of(row), of(column), of(rest))


def build_grid(knowledge: Mapping[str, Mapping[str, str]], wordings: Mapping[str, str | tuple[str, str]]) -> Grid:
    """Make a grid from knowledge items (name → fields, ``target`` among them) and wordings (name → template).

    A template is a prompt with the fields' names in braces, or a pair of them, the second for the target
    (default ``{target}``). Raises UsageError for a field that an item does not have.
    """
    cells = []
    for item, fields in knowledge.items():
        for wording, given in wordings.items():
            prompt, target = (given, "{target}") if isinstance(given, str) else given
            where = f"knowledge {item!r} in wording {wording!r}"
            filled = _fill(prompt, fields, where), _fill(target, fields, where)
            cells.append({"knowledge": item, "wording": wording, "prompt": filled[0], "target": filled[1]})
    return _grid([(f"cell {at}", cell) for at, cell in enumerate(cells, start=1)], "the grid", UsageError)


def _fill(template: str, fields: Mapping[str, str], where: str) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in fields:
            raise UsageError(f"{where}: no field {match[1]!r}; the item has {', '.join(fields) or 'none'}")
        return fields[match[1]]

    return re.sub(r"\{(\w+)\}", value, template)


def read_grid(path: str | Path | None = None) -> Grid:
    """A grid from JSON lines, one cell each: ``knowledge``, ``wording``, ``prompt``, ``target``, all texts.

    Default: the grid that ships, about Python's standard library. Raises FailuresError (with the line)
    for a cell that is mistyped or there twice, and for a grid with a cell missing or fewer than 2 × 2.
    """
    source = shipped("grid.jsonl") if path is None else Path(path)
    lines = []
    for number, row in read_lines(source):
        where = f"{source}, line {number}"
        for key in KEYS:
            value = row.get(key)
            if not isinstance(value, str) or not value:
                found = f"{key} is no text" if value else f"no {key}"
                raise FailuresError(f"{where}: {found}; expected {', '.join(KEYS)}, all texts")
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise FailuresError(f"{where}: {key} has half of a surrogate pair; expected well-formed Unicode")
        unknown = sorted(set(row) - set(KEYS))
        if unknown:
            raise FailuresError(f"{where}: unknown key {unknown[0]!r}; expected {', '.join(KEYS)}")
        lines.append((where, row))
    return _grid(lines, str(source), FailuresError)


def write_grid(grid: Grid, path: str | Path) -> None:
    """Write a grid as ``read_grid`` reads it."""
    lines = []
    for at, cell in enumerate(grid.cells):
        g, s = divmod(at, len(grid.wordings))
        values = (grid.knowledge[g], grid.wordings[s], cell.prompt, cell.target)
        lines.append(json.dumps(dict(zip(KEYS, values, strict=True)), ensure_ascii=False) + "\n")
    Path(path).write_text("".join(lines), encoding="utf-8")


def _grid(
    lines: Sequence[tuple[str, Mapping[str, str]]], source: str, error: type[FailuresError] | type[UsageError]
) -> Grid:
    """The checked grid of cells that come with the place they were found at."""
    places: dict[tuple[str, str], str] = {}
    asked: dict[str, str] = {}
    cells: dict[tuple[str, str], Failure] = {}
    for where, cell in lines:
        key, prompt = (cell["knowledge"], cell["wording"]), cell["prompt"]
        if key in places:
            raise error(f"{where}: knowledge {key[0]!r} in wording {key[1]!r} is there already ({places[key]})")
        if prompt in asked:
            raise error(f"{where}: its prompt is that of {asked[prompt]}; every cell asks in its own words")
        places[key] = asked[prompt] = where
        cells[key] = Failure(prompt, cell["target"], f"{key[0]} / {key[1]}")
    knowledge, wordings = (tuple(dict.fromkeys(key[side] for key in cells)) for side in (0, 1))
    if len(knowledge) < 2 or len(wordings) < 2:
        raise error(f"{source}: a grid of {len(knowledge)} × {len(wordings)}; expected at least 2 × 2 cells")
    for item in knowledge:
        for wording in wordings:
            if (item, wording) not in cells:
                raise error(f"{source}: no cell for knowledge {item!r} in wording {wording!r}; a grid has them all")
    return Grid(knowledge, wordings, tuple(cells[item, wording] for item in knowledge for wording in wordings))
