"""The grid: reading, building, the one that ships, and effects cell by cell."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import oracle_models
import pytest
from oracle_models import State, bold_star

from lmrepair import FailuresError, UsageError, answers, load, repair_each
from lmrepair.measure.grid import build_grid, grid_effects, read_grid, write_grid

ROOT = Path(__file__).resolve().parents[2]
KNOWLEDGE = {"sum": {"task": "add up", "target": " sum(a)"}, "length": {"task": "count", "target": " len(a)"},
             "open": {"task": "open", "target": " open(f)"}}  # fmt: skip
WORDINGS: dict[str, str | tuple[str, str]] = {
    "plain": "{task}:", "polite": "please {task} it:", "line": ("do {task} {it}", "{target}\n"),
}  # fmt: skip


def fields() -> dict[str, dict[str, str]]:
    return {name: {**item, "it": "{task}"} for name, item in KNOWLEDGE.items()}


def test_building() -> None:
    grid = build_grid(fields(), WORDINGS)
    assert (grid.knowledge, grid.wordings) == (("sum", "length", "open"), ("plain", "polite", "line"))
    assert [cell.prompt for cell in grid.cells[:3]] == ["add up:", "please add up it:", "do add up {task}"]  # one pass
    assert grid.cell(1, 2).target == " len(a)\n"
    assert len({cell.id for cell in grid.cells}) == 9
    assert [grid.cells[at].prompt for at in grid.row(1, 0)] == ["please count it:", "do count {task}"]
    assert [grid.cells[at].prompt for at in grid.column(1, 0)] == ["add up:", "open:"]
    for g, s in ((3, 0), (0, 3), (-1, 0), (0, -1)):
        with pytest.raises(UsageError, match="outside the grid of 3 × 3"):
            grid.cell(g, s)
    with pytest.raises(UsageError, match="'sum'.*'plain'.*no field 'it'; the item has task, target"):
        build_grid(KNOWLEDGE, {"plain": "{it}", "other": "{task}"})
    with pytest.raises(UsageError, match="prompt is that of cell 1"):
        build_grid(fields(), {"plain": "same", "other": "{task}"})


def test_there_and_back(tmp_path: Path) -> None:
    grid = build_grid(fields(), WORDINGS)
    write_grid(grid, tmp_path / "grid.jsonl")
    assert read_grid(tmp_path / "grid.jsonl") == grid


def cell(**changes: Any) -> dict[str, Any]:
    return {"knowledge": "a", "wording": "x", "prompt": "p", "target": "t", **changes}


GOOD = [cell(), cell(wording="y", prompt="q"), cell(knowledge="b", prompt="r"),
        cell(knowledge="b", wording="y", prompt="s")]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([GOOD[0], cell(wording="y", prompt=3)], "line 2: prompt is no text"),
        ([GOOD[0], cell(wording="")], "line 2: no wording"),
        ([{"knowledge": "a"}], "line 1: no wording; expected knowledge, wording, prompt, target"),
        ([cell(target="\ud800")], "line 1: target has half of a surrogate"),
        ([cell(id="7")], "line 1: unknown key 'id'"),
        ([GOOD[0], cell(prompt="z")], "line 2: knowledge 'a' in wording 'x' is there already .*line 1"),
        ([GOOD[0], cell(wording="y")], "line 2: its prompt is that of .*line 1"),
        (GOOD[:3], "no cell for knowledge 'b' in wording 'y'"),
        (GOOD[:2], "a grid of 1 × 2"),
        ([], "a grid of 0 × 0"),
        ([GOOD[0], ["a"]], "line 2: found a list"),
    ],
)
def test_what_is_no_grid_is_refused(rows: list[Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(FailuresError, match=said):
        read_grid(tmp_path / "bad.jsonl")


def test_effects_of_a_repair() -> None:
    net = oracle_models.net()
    untouched = State.of(net)
    grid = build_grid(fields(), WORDINGS)
    (result,) = repair_each(net, [grid.cell(1, 0)], bold_star(learning_rate=0.1))
    assert result.patch is not None
    before = answers(net, grid.cells, generate=False)
    found = grid_effects(net, grid, result.patch, (1, 0))
    assert not untouched.changed(net)
    with result.patch.on(net):
        after = answers(net, grid.cells, generate=False)
    assert found == grid_effects(net, grid, result.patch, (1, 0), before)
    assert (found.cell.before.exact, found.cell.after.exact) == (0, 1)
    places = {"cell": [3], "row": [4, 5], "column": [0, 6], "elsewhere": [1, 2, 7, 8]}
    for name, at in places.items():
        part = getattr(found, name)
        assert part.probes == len(at)
        for standing, item in ((part.before, before), (part.after, after)):
            assert standing.match == pytest.approx(sum(item[place].match for place in at) / len(at))
            ranks = [sum(item[place].rank) / len(item[place].rank) for place in at]
            assert standing.rank == pytest.approx(sum(ranks) / len(at))


def test_the_grid_that_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "training"))
    monkeypatch.delitem(sys.modules, "grid", raising=False)
    import grid as script

    grid = read_grid()
    assert grid == script.grid()
    assert len(grid.knowledge) >= 12
    assert len(grid.wordings) >= 6
    for g in range(len(grid.knowledge)):
        assert len({grid.cell(g, s).target for s in range(len(grid.wordings))}) == 1
    found = answers(load("embedded"), grid.cells, generate=False)
    failing = sum(item.match < 1 for item in found)
    assert 10 <= failing < len(found)  # something to repair, and something to spoil
