"""The evaluate command and what it gathers: the figures of the modules it calls, for a user and for scripts."""

from __future__ import annotations

import json
import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle_models
import pytest
from command import Run, write
from oracle_models import FAILURES, TEXT, State, bold_star

from lmrepair import Drift, Reference, UsageError, answers, diagnose, evaluate, measure_drift, repair, repair_each
from lmrepair.cli.options import read_references
from lmrepair.cli.output.render_measures import measures_data, measures_text
from lmrepair.failures.rows import Failure
from lmrepair.measure import needed_by
from lmrepair.measure.effects import side_effects
from lmrepair.measure.grid import build_grid, grid_effects, read_grid
from lmrepair.measure.intervals import bootstrap, paired
from lmrepair.measure.summary import Material, Measures, measure
from lmrepair.patch.patch import Patch

GRID = build_grid(
    {
        "open": {"ask": "open the file", "target": " with open(path)"},
        "say": {"ask": "say it", "target": " hi"},
    },
    {"plain": "{ask}", "polite": "please {ask}"},
)
TEXTS = [Reference("fox", ("the quick brown fox",)), Reference("code", ("for i in a:\n    print(i)\n",))]


def patch_for(net: oracle_models.Net, failure: Failure) -> Patch:
    (result,) = repair_each(net, [failure], bold_star(learning_rate=0.1))
    assert result.patch is not None
    return result.patch


def test_the_figures_are_those_of_the_modules() -> None:
    net = oracle_models.net()
    untouched = State.of(net)
    patch = patch_for(net, FAILURES[0])
    found = measure(net, Material(FAILURES[:2], FAILURES[2:], TEXTS, GRID), patch)
    assert not untouched.changed(net)
    assert found.before == evaluate(net, FAILURES[:2], texts=True)
    with patch.on(net):
        assert found.after == evaluate(net, FAILURES[:2], texts=True)
        held_out = evaluate(net, FAILURES[2:], texts=True)
    assert found.held_out is not None
    assert found.held_out.after == (held_out,)
    assert found.patched == 1
    assert found.side_effects == side_effects(net, patch, FAILURES[:1], [*FAILURES[2:], FAILURES[1]])
    for kind in TEXTS:
        assert [found.drift[kind.name]] == measure_drift(net, [patch], kind)
    assert found.drift[next(iter(found.drift))].kl == max(drift.kl for drift in found.drift.values())
    assert found.grid is not None
    assert found.grid.cells == (grid_effects(net, GRID, patch, (0, 0)),)
    assert found.grid.whole is not None
    assert found.grid.whole.probes == 4


def test_the_grid_is_seen_from_the_cells_that_were_repaired() -> None:
    net = oracle_models.net()
    patch = patch_for(net, GRID.cell(0, 1))
    found = measure(net, Material(FAILURES[1:2], grid=GRID), patch)
    assert found.grid is not None
    assert found.grid.cells == (grid_effects(net, GRID, patch, (0, 1)),)


def test_intervals_are_over_failures() -> None:
    net = oracle_models.net()
    patch = patch_for(net, FAILURES[0])
    before = [evaluate(net, [row]).token_match for row in FAILURES]
    with patch.on(net):
        after = [evaluate(net, [row]).token_match for row in FAILURES]
    found = measure(net, Material(FAILURES), patch).matches
    assert (found.before, found.after) == (bootstrap(before), bootstrap(after))
    assert found.difference == paired(after, before)


def test_without_a_patch() -> None:
    net = oracle_models.net()
    found = measure(net, Material(FAILURES, references=TEXTS, grid=GRID), texts=False)
    assert found.before == evaluate(net, FAILURES)
    assert found.after is found.side_effects is found.held_out is None
    assert found.grid is not None
    assert found.grid.whole is None
    cells = answers(net, GRID.cells, generate=False)
    for s, name in enumerate(("plain", "polite")):
        mine = [item.gap for item in cells[s::2]]
        gap = sum(sum(gaps) / len(gaps) for gaps in mine) / 2
        assert found.grid.wordings[name].gap == pytest.approx(gap)
    assert all(drift.perplexity_after == drift.perplexity_before for drift in found.drift.values())
    data = measures_data("m", found, GRID, None)
    assert data["drift"] == []
    assert {item["kind"] for item in data["perplexity"]} == {"fox", "code"}
    assert measure(net, Material(FAILURES[:1])).drift == {}


def test_held_out_rows_must_be_held_out() -> None:
    net = oracle_models.net()
    patch = patch_for(net, FAILURES[0])
    with pytest.raises(UsageError, match="1 held-out rows .*'open'.* take them out"):
        measure(net, Material(FAILURES, FAILURES), patch)
    (other,) = [replace(FAILURES[0], target=" another")]
    with pytest.raises(UsageError, match="held-out"):
        measure(net, Material(FAILURES, [other]), patch)
    assert measure(net, Material(FAILURES[:1], FAILURES[1:]), patch).held_out is not None


def test_a_patch_for_other_failures_has_no_side_effects_here() -> None:
    net = oracle_models.net()
    found = measure(net, Material(FAILURES[1:]), patch_for(net, FAILURES[0]))
    assert found.patched == 0
    assert found.side_effects is None
    text = "\n".join(measures_text(measures_data("m", found, None, "p")))
    assert "not measured, the patch was made for none of these failures" in text


def made(**changes: Any) -> Measures:
    net = oracle_models.net()
    patch = patch_for(net, FAILURES[0])
    pool = [Failure("close the file", " f.close()")]
    return replace(measure(net, Material(FAILURES[:1], pool, TEXTS, GRID), patch), **changes)


def test_json_has_no_infinity_and_text_says_so() -> None:
    broken = {"bad": Drift(math.nan, 0.0, 5, 3.0, math.inf), "good": Drift(0.5, 1.0, 5, 3.0, 4.0)}
    data = measures_data("m", made(drift=broken), GRID, "p")
    assert json.loads(json.dumps(data, allow_nan=False))["drift"][0] == {
        "kind": "bad", "kl": None, "agreement": 0.0, "tokens": 5, "perplexity_before": 3.0, "perplexity_after": None,
    }  # fmt: skip
    lines = measures_text(data)
    assert "no number" in lines[-2]
    assert "3.00 → beyond" in lines[-2]
    assert "0.50000" in lines[-1]


def test_names_cannot_drive_the_terminal() -> None:
    evil = "\x1b[2J\u202e[red]"
    found = made(drift={evil: Drift(0.1, 1.0, 5, 3.0, 4.0)})
    grid = replace(GRID, knowledge=(evil, "say"), wordings=(evil, "polite"))
    text = "\n".join(measures_text(measures_data(evil, found, grid, evil)))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert text.count("\\x1b[2J\\u202e[red]") == 5


def test_the_command(run: Run, failures: Path, tmp_path: Path) -> None:
    pool = write(tmp_path / "pool.jsonl", {"prompt": "import datetime\n\ntoday = ", "target": "date.today()\n"})
    text = write(tmp_path / "t.jsonl", {"text": "import os\nprint(os.getcwd())\n"})
    assert run("repair", failures, "--output", "p.safetensors", "--reference", text)[0] == 0
    options = ("--patch", "p.safetensors", "--held-out", pool, "--reference", f"code={text}", "--reference", text)
    code, out, _ = run("evaluate", failures, *options, "--grid", "embedded", "--json")
    data = json.loads(out)
    assert code == 0
    assert (data["failures"], data["patched"]) == (2, 2)
    assert data["scores"]["after"]["greedy_match"] == 1.0 > data["scores"]["before"]["greedy_match"]
    assert data["scores"]["after"]["greedy_bleu"] == pytest.approx(1.0)
    assert {item["kind"].split("@")[0] for item in data["drift"]} == {"code", "t"}
    assert data["held_out"]["before"]["failures"] == 1
    assert data["side_effects"]["specificity"]["probes"] == 1
    assert data["grid"]["count"] == len(read_grid().cells)

    code, out, err = run("evaluate", failures, *options, "--no-texts")
    assert (code, err) == (0, "")
    assert "BLEU" not in out
    for said in ("token match", "generalisation", "specificity", "held out (1 rows)", "worst kind first"):
        assert said in out
    assert run("apply", "p.safetensors", "--model", embedded(), "--output", "patched")[0] == 0
    again = json.loads(run("evaluate", failures, "--model", "patched", *options, "--json")[1])
    assert {**again, "model": "", "grid": None} == {**data, "model": "", "grid": None}  # patched already or not


def embedded() -> Path:
    from importlib.resources import files as resources

    return Path(str(resources("lmrepair") / "model" / "embedded" / "model"))


def test_without_the_extra_the_command_says_which(
    run: Run, failures: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    text = write(tmp_path / "t.jsonl", {"text": "import os\n"})
    code, out, err = run("evaluate", failures, "--reference", text)
    assert (code, out) == (2, "")
    assert "lmrepair[bench]" in err
    assert run("evaluate", failures, "--reference", text, "--no-texts")[0] == 0


def test_references_by_kind(tmp_path: Path) -> None:
    rows = ({"text": "a b", "kind": "x"}, {"text": "c"}, {"text": "d", "kind": "x"})
    path = write(tmp_path / "mixed.jsonl", *rows)
    assert [found.name.split("@")[0] for found in read_references([])][:2] == ["python", "sh"]
    (found,) = read_references([f"all={path}"])
    assert found.name.startswith("all@")
    assert found.texts == ("a b", "c", "d")
    assert read_references([str(path)])[0].name.startswith("mixed@")
    for wrong in ("=x", "kind="):
        with pytest.raises(UsageError, match="KIND=FILE"):
            read_references([wrong])


def test_which_failure_needed_each_layer_is_seen_by_leaving_it_as_it_was(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = oracle_models.net()
    result = repair(net, FAILURES[:2], bold_star(learning_rate=0.1), TEXT)
    patch = result.patch
    assert patch is not None
    state = State.of(net)
    found = needed_by(net, patch)
    assert not state.changed(net)  # applied before, applied after
    patch.revert(net)
    assert needed_by(net, patch) == found
    assert any(found.values())
    for layer, ids in found.items():
        rest = replace(patch, changes={at: change for at, change in patch.changes.items() if at != layer})
        with rest.on(net) if rest.changes else nullcontext():
            lost = [item.tokens.id for item in diagnose(net, FAILURES[:2]) if item.mistakes]
        assert list(ids) == [one for one in lost if one in [i.tokens.id for i in patch.items if i.repaired]]
    patch.save(tmp_path / "p")
    monkeypatch.setattr("lmrepair.model.load", lambda *_, **__: net)
    _, out, _ = run("show", "p", "--model", "tiny", "--json")
    assert {part["layer"]: tuple(part["needed_by"]) for part in json.loads(out)["by_layer"]} == found
    _, out, _ = run("show", "p", "--model", "tiny")
    assert out.count("needed by") == sum(map(bool, found.values()))
    assert "needed" not in run("show", "p")[1]
