"""The bench: its grid is checked, done cells are skipped, and nothing that fails or is killed stops the others."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import works
from command import Run, write

from lmrepair import cli
from lmrepair.bench.cells import measure, solved_before, task_rows
from lmrepair.bench.grid_file import BenchGrid, DataSpec, Job, read_grid
from lmrepair.bench.run import Planned, Summary, bench, plan
from lmrepair.errors import UsageError
from lmrepair.failures.rows import Failure
from lmrepair.measure.shown import plain
from lmrepair.measure.texts import corpus_bleu, text_scores

ROOT = Path(__file__).resolve().parents[2]
GRID = """
[measure]
heldout = 2
neighbours = 2
every = 1
[[models]]
name = "embedded"
[[data]]
name = "habits"
file = "embedded"
[[drift]]
kind = "python"
tokens = 64
[[methods]]
name = "star"
[[methods]]
name = "sgd"
preset = "paper"
[[methods]]
name = "prompt"
[[studies]]
kind = "alone"
failing = 2
"""


def made(folder: Path, text: str = GRID) -> Path:
    path = folder / "grid.toml"
    path.write_text(text, encoding="utf-8")
    return path


def planned(folder: Path, text: str = GRID) -> tuple[BenchGrid, list[Planned]]:
    grid = read_grid(made(folder, text))
    return grid, plan(grid, folder / "out", folder, folder, threads=1)


def run(folder: Path, work: Any, text: str = GRID, jobs: int = 1) -> tuple[Summary, list[str]]:
    grid, cells = planned(folder, text)
    lines: list[str] = []
    return bench(grid, cells, jobs, "local", lines.append, work), lines


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """The records by method, or cell of another study, without what may differ from run to run."""
    found = {}
    for path in sorted((folder / "out").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"), object_hook=untimed)
        alone = path.name.startswith("alone.")
        found[record["config"]["method"]["name"] if alone else path.name] = record
    return found


def untimed(table: dict[str, Any]) -> dict[str, Any]:
    timed = ("forward_equivalents", "peak_memory", "machine")
    return {key: value for key, value in table.items() if key not in timed and not key.endswith("seconds")}


def untimed_row(row: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(row), object_hook=untimed))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("failing = 2", "faling = 2", "studies 1: unknown key 'faling'; did you mean 'failing'?"),
        ("failing = 2", "failing = 0", "failing is 0; expected 1 or more"),
        ("failing = 2", "failing = true", "failing is True; expected a whole number"),
        ('kind = "alone"', 'kind = "lonely"', "kind is 'lonely'; expected one of alone, together"),
        ('kind = "alone"', 'kind = "together"', "'prompt' changes no weights"),
        ('kind = "alone"', 'kind = "sparsity"', "a sparsity study without targeting"),
        ('kind = "alone"', 'kind = "grid"', "no data for it"),
        ('kind = "alone"', 'kind = "alone"\nmethods = ["stra"]', "methods names 'stra'; did you mean 'star'?"),
        ('kind = "alone"', 'kind = "alone"\nmethods = ["star"]\nshare = ["2"]', "share '2' is out of range"),
        ('kind = "alone"', 'kind = "alone"\nmethods = ["star"]\npattern = ["odd"]', "pattern 'odd'"),
        ('preset = "paper"', 'preset = "pepper"', "has no preset 'pepper'; did you mean 'paper'?"),
        ('preset = "paper"', "settings = {learning_rate = 'fast'}", "learning_rate is 'fast'; expected a number"),
        ('preset = "paper"', "settings = {rate = 1}", "has no setting 'rate'"),
        ('name = "prompt"', 'name = "prompt"\npreset = "x"', "the prompt yardstick has no settings"),
        ('preset = "paper"', "statistics = 'a.txt'", "'sgd' reads no reference text"),
        ('preset = "paper"', "own_texts = 8", "'sgd' reads no reference text"),
        ('name = "prompt"', 'name = "prompt"\nprefixes = 2', "the prompt yardstick has no settings"),
        ('name = "prompt"', 'name = "prompt"\nown_texts = 8', "'prompt' reads no reference text"),
        (
            'name = "prompt"',
            'name = "minkl"\nown_texts = 0',
            "own_texts is 0; expected 1 or more, or 0 beside statistics",
        ),
        ('name = "prompt"', 'name = "prmpt"', "unknown method 'prmpt'; did you mean 'prompt'?"),
        ('name = "sgd"', 'name = "star"\nmethod = "sgd"', "methods has 'star' twice"),
        ('file = "embedded"', 'file = "/data/x.jsonl"', "expected a path relative to the grid's folder"),
        ('name = "habits"', "", "data 1: no name; expected text"),
        ("tokens = 64", "tokens = 64\n[[drift]]\nkind = 'python'", "drift names one kind twice"),
        ('kind = "python"', 'kind = "a.b"', "kind is 'a.b'; expected letters"),
        ('name = "habits"', 'name = "habits"\nchat = "yes"', "chat is 'yes'; expected true or false"),
        ('name = "habits"', 'name = "habits"\nend_turn = false\nformat = "grid"', "has no template, chats and"),
        ("heldout = 2", "heldout = -1", "heldout is -1; expected 0 or more"),
        ("[[studies]]", "[[study]]", "no studies; expected a list"),
        ("[[studies]]", "[[studies]]\nkind='alone'\n[[studies]]", "two studies hold the cell 'alone.embedded"),
        ("[measure]", "[measure", "broken TOML"),
    ],
)
def test_a_grid_that_is_wrong_says_where_and_how(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in GRID
    with pytest.raises(UsageError, match=re.escape(said)):
        read_grid(made(tmp_path, GRID.replace(old, new, 1)))


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.toml")), ids=lambda path: path.stem)
def test_the_grids_that_ship_are_sound(path: Path) -> None:
    cells = read_grid(path).cells
    assert {"star", "minkl"} <= {cell.method.method for cell in cells}
    assert len({cell.name for cell in cells}) == len(cells)


@pytest.mark.parametrize("name", ["main", "smoke"])
def test_the_whole_comparison_leaves_no_study_out(name: str) -> None:
    cells = read_grid(ROOT / "benchmarks" / f"{name}.toml").cells
    assert {"alone", "together", "cumulative", "sparsity", "grid"} == {cell.study for cell in cells}
    assert {"star", "mint", "sgd", "finetune", "lora", "minkl", "prompt"} <= {cell.method.method for cell in cells}


def test_a_settings_default_is_part_of_what_a_cell_is_made_from(tmp_path: Path) -> None:
    _, cells = planned(tmp_path)
    assert cells[0].config["method"]["settings"]["epochs"] > 0
    _, others = planned(tmp_path, GRID.replace('name = "star"', 'name = "star"\nsettings = {epochs = 7}'))
    assert cells[0].digest != others[0].digest
    assert [cell.digest for cell in cells[1:]] == [cell.digest for cell in others[1:]]


def test_how_rows_are_asked_is_part_of_what_a_cell_is_made_from(tmp_path: Path) -> None:
    """And a grid that does not say it is as it was before grids could."""
    digests = []
    for more in ("", "\nchat = false\nend_turn = true", "\nchat = true", "\nend_turn = false"):
        _, cells = planned(tmp_path, GRID.replace('name = "habits"', f'name = "habits"{more}'))
        digests.append(cells[0].digest)
        assert set(cells[0].config["data"]) - {"chat", "end_turn"} == {"name", "file", "template", "heldout", "format"}
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    chat = [{"role": "user", "content": "hi"}]
    write(tmp_path / "rows.jsonl", {"messages": chat, "target": "b"}, {"prompt": "a", "target": "b"})
    for asked, end_turn in ((False, True), (True, False)):
        one, two = task_rows(DataSpec("x", "rows.jsonl", chat=asked, end_turn=end_turn), tmp_path / "rows.jsonl")
        assert (one.end_turn, bool(two.messages)) == (end_turn, asked)


def test_other_statistics_are_part_of_what_a_cell_is_made_from(tmp_path: Path) -> None:
    """And a method that has none is as it was before grids could name them."""
    plain = 'name = "minkl"'
    made_from = set()
    (tmp_path / "a.txt").write_text("x = 1\n", encoding="utf-8")
    for more in (
        "",
        "\nstatistics = 'a.txt'",
        "\nown_texts = 8",
        "\nown_texts = 0\nstatistics = 'a.txt'",
        "\nprefixes = 2",
    ):
        _, cells = planned(tmp_path, GRID.replace('name = "prompt"', plain + more))
        (one,) = [cell for cell in cells if cell.config["method"]["method"] == "minkl"]
        made_from.add(one.digest)
        assert more or not {"statistics", "own_texts", "prefixes"} & set(one.config["method"])
    assert len(made_from) == 5


def test_done_cells_are_skipped_and_stale_ones_run_again(tmp_path: Path) -> None:
    assert run(tmp_path, works.quick, jobs=2)[0] == Summary(3, 0, ())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert len(before) == 3
    assert run(tmp_path, works.quick)[0] == Summary(0, 3, ())
    summary, lines = run(tmp_path, works.quick, GRID.replace('name = "star"', 'name = "star"\nsettings = {epochs = 7}'))
    assert summary == Summary(1, 2, ())
    assert "(1 stale)" in lines[0]
    changed = [path.name for path, then in before.items() if path.stat().st_mtime_ns != then]
    assert changed == ["alone.embedded.habits.star.seed-0.json"]
    next(iter(before)).write_text("{", encoding="utf-8")
    assert "1 damaged" in run(tmp_path, works.quick, GRID)[1][0]
    grid = read_grid(tmp_path / "grid.toml")
    again = plan(grid, tmp_path / "out", tmp_path, tmp_path, threads=1, only="prompt", again=True)
    assert bench(grid, again, 1, "local", lambda _: None, works.quick) == Summary(1, 0, ())


def test_done_cells_follow_the_grid_and_nothing_else_of_them_changes(tmp_path: Path) -> None:
    run(tmp_path, works.quick)
    before = records(tmp_path)
    other = GRID.replace('[[methods]]\nname = "star"\n', "").replace(
        "[[studies]]", '[[methods]]\nname = "star"\n[[studies]]'
    )
    assert run(tmp_path, works.quick, other)[0] == Summary(0, 3, ())
    after = records(tmp_path)
    assert [(name, after[name]["order"]) for name in before] == [("prompt", 1), ("sgd", 0), ("star", 2)]
    assert {name: {**record, "order": before[name]["order"]} for name, record in after.items()} == before


def test_a_cell_asked_for_more_rows_knows_its_first_ones(tmp_path: Path) -> None:
    run(tmp_path, works.whole)
    more = GRID.replace("failing = 2", "failing = 3")
    grid, cells = planned(tmp_path, more)
    assert [cell.state for cell in cells] == ["to be extended"] * 3
    assert [len(cell.job.known["failures"]) for cell in cells] == [2, 2, 2]
    assert {cell.weight for cell in cells} == {1}
    assert {cell.state for cell in planned(tmp_path, GRID.replace("failing = 2", ""))[1]} == {"to be extended"}
    asked_again = plan(grid, tmp_path / "out", tmp_path, tmp_path, threads=1, again=True)
    assert [(cell.state, cell.job.known) for cell in asked_again] == [("stale", {})] * 3
    for fewer_or_other in (
        GRID.replace("failing = 2", "failing = 1"),
        more.replace("every = 1", "every = 2"),
        more.replace("tokens = 64", "tokens = 32"),
        more.replace('kind = "alone"\n', 'kind = "alone"\nseeds = [0]\n').replace("neighbours = 2", "neighbours = 1"),
    ):
        _, cells = planned(tmp_path, fewer_or_other)
        assert [(cell.state, cell.job.known) for cell in cells] == [("stale", {})] * 3
    path = tmp_path / "out" / "alone.embedded.habits.star.seed-0.json"
    record = json.loads(path.read_text())
    for broken in ({"failures": None}, {"failures": [{}] * 3}, {"status": "failed"}, {"config": {"failing": True}}):
        path.write_text(json.dumps(record | broken), encoding="utf-8")
        assert planned(tmp_path, more)[1][0].state == "stale"
    path.write_text(json.dumps({key: value for key, value in record.items() if key != "heldout"}), encoding="utf-8")
    assert planned(tmp_path, more)[1][0].state == "stale"
    assert run(tmp_path, works.whole, more)[0] == Summary(3, 0, ())
    assert run(tmp_path, works.whole, more)[0] == Summary(0, 3, ())


def test_a_cell_that_raises_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    summary, lines = run(tmp_path, works.broken)
    assert (summary.run, len(summary.failed)) == (3, 1)
    found = records(tmp_path)
    assert {name: record["status"] for name, record in found.items()} == {
        "star": "failed", "sgd": "done", "prompt": "done",
    }  # fmt: skip
    assert found["star"]["error"]["type"] == "KeyError"
    assert "works.py" in found["star"]["error"]["at"]
    assert str(tmp_path) not in json.dumps(found)
    assert any("FAILED: KeyError" in line for line in lines)
    assert any("left" in line for line in lines)
    assert run(tmp_path, works.quick)[0] == Summary(1, 2, ())
    assert records(tmp_path)["star"]["status"] == "done"


def test_a_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    summary, _ = run(tmp_path, works.dying)
    assert [name for name, _ in summary.failed] == ["alone.embedded.habits.star.seed-0"]
    found = records(tmp_path)
    assert found["star"]["error"]["type"] == "WorkerDied"
    assert (tmp_path / "alone.embedded.habits.star.seed-0.tried").read_text() == "xxx"
    assert (tmp_path / "alone.embedded.habits.sgd.seed-0.tried").read_text() == "xx"
    assert found["sgd"]["status"] == found["prompt"]["status"] == "done"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_it_goes_on_where_it_was(tmp_path: Path, how: signal.Signals) -> None:
    made(tmp_path)
    script = (
        "import sys, works; from pathlib import Path; from lmrepair.bench import bench, plan\n"
        "from lmrepair.bench import read_grid\nfrom lmrepair.cli.faults import guarded\n"
        "def run():\n"
        "    at = Path(sys.argv[1]); grid = read_grid(at / 'grid.toml')\n"
        "    bench(grid, plan(grid, at / 'out', at, at, threads=1), 1, 'local', print, works.slow)\n"
        "if __name__ == '__main__': sys.exit(guarded(run))\n"
    )
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    second = tmp_path / "alone.embedded.habits.sgd.seed-0.begun"
    wait_for(lambda: second.exists() and bool(second.read_text()), process)
    process.send_signal(how)
    _, said = process.communicate()
    if how == signal.SIGTERM:
        assert process.returncode == 143
        assert said == b"lmrepair: error: stopped by SIGTERM; the model is as it was\n"
    worker = int(second.read_text())
    wait_for(lambda: not alive(worker))
    done = sorted((tmp_path / "out").glob("*.json"))
    assert [path.name for path in done] == ["alone.embedded.habits.star.seed-0.json"]
    kept = done[0].read_bytes()
    assert run(tmp_path, works.quick)[0] == Summary(2, 1, ())
    assert done[0].read_bytes() == kept
    assert len(list((tmp_path / "out").iterdir())) == 3


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(true: Callable[[], bool], process: subprocess.Popen[bytes] | None = None, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        assert process is None or process.poll() is None
        time.sleep(0.02)


# Two methods, for what takes a real worker: it imports torch first.
TWO = GRID.replace('[[methods]]\nname = "sgd"\npreset = "paper"\n', "")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a bench whose cells were measured, not stood in for; ``said``: what the command printed."""
    folder = tmp_path_factory.mktemp("real")
    grid = made(folder, TWO + '[[studies]]\nkind = "cumulative"\nfailing = 2\nmethods = ["star"]\n')
    arguments = ["lmrepair", "bench", str(grid), "--output", str(folder / "out"), "--threads", "1"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert not stopped.value.code
    (folder / "said").write_text(out.getvalue(), encoding="utf-8")
    return folder


def test_a_real_cell_keeps_what_its_figures_are_made_from(real: Path) -> None:
    found = {path.name.split(".seed")[0]: json.loads(path.read_text()) for path in (real / "out").iterdir()}
    assert {record["status"] for record in found.values()} == {"done"}
    star, prompt = found["alone.embedded.habits.star"], found["alone.embedded.habits.prompt"]
    for row in star["failures"]:
        assert row["repaired"]
        for side in ("before", "after"):
            answer = row[side]
            teacher, greedy = (text_scores(answer[key], row["target"]) for key in ("preferred", "written"))
            assert answer["teacher"]["bleu"] == pytest.approx(teacher.bleu, rel=1e-4)
            assert answer["greedy"]["edit_similarity"] == pytest.approx(greedy.edit_similarity, rel=1e-4)
            assert answer["teacher"]["token_match"] == pytest.approx(
                1 - len(answer["mistakes"]) / len(row["tokens"]), abs=1e-5
            )
        assert row["before"]["mistakes"]
        assert row["drift"]["python"]["kl"] > 0
        assert row["drift"]["python"]["tokens"] <= 64
        assert row["patch"]["parameters"] > row["patch"]["neurons"] > 0
        assert row["cost"]["seconds"] > 0
        assert row["generalisation"]["paraphrases"]["probes"] == 2
        assert row["specificity"]["probes"] == 2
    held = star["heldout"]
    assert held["rows"] == 2
    assert 0 <= corpus_bleu([text for _, text in held["preferred"]], ["a", "b"]) <= 1
    assert "patch" not in prompt["failures"][0]
    assert [row["id"] for row in prompt["failures"]] == [row["id"] for row in star["failures"]]
    assert [point["k"] for point in found["cumulative.embedded.habits.star"]["curve"]] == [0, 1, 2]
    assert str(Path.home()) not in json.dumps([record["machine"] for record in found.values()])

    (again,) = plan(
        read_grid(real / "grid.toml"),
        real / "out",
        real,
        real,
        threads=1,
        only="alone.embedded.habits.star",
        again=True,
    )
    assert again.state == "to be repeated"
    found_again = json.loads(json.dumps(plain(measure(again.job))), object_hook=untimed)
    assert found_again == {key: value for key, value in records(real)["star"].items() if key in found_again}
    assert {"failures", "heldout"} <= found_again.keys()


def test_rows_that_are_known_stay_as_they_are_and_the_others_come_after(real: Path) -> None:
    text = TWO.replace("heldout = 2", "heldout = 0").replace("neighbours = 2", "neighbours = 0")

    def job(failing: int) -> Job:
        (cell, _) = read_grid(made(real / "more", text.replace("failing = 2", f"failing = {failing}"))).cells
        return Job(cell, real, real, threads=1)

    (real / "more").mkdir()
    two, three = (json.loads(json.dumps(plain(measure(job(count))))) for count in (2, 3))
    marked = {**two, "failures": [{**row, "mark": True} for row in two["failures"]], "seconds": 1000.0}
    found = json.loads(json.dumps(measure(replace(job(3), known=marked))))
    assert [row.pop("mark", False) for row in found["failures"]] == [True, True, False]
    assert found["seconds"] > 1000
    assert [untimed_row(row) for row in found["failures"]] == [untimed_row(row) for row in three["failures"]]
    for elsewhere in ({"versions": {}}, {"machine": {}}, {"heldout": {"rows": 1}}):
        anew = measure(replace(job(3), known={**marked, **elsewhere}))
        assert [row.get("mark", False) for row in anew["failures"]] == [False] * 3
        assert anew["seconds"] < 1000


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray (the extra ray)")
def test_on_ray_a_killed_worker_costs_its_cell_another_try(
    tmp_path: Path, real: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    planned(tmp_path, TWO)
    # Ray's threads have been seen to end a process seconds after ray.shutdown(): it gets one of its own.
    lines = subprocess.run(
        [sys.executable, "-c", "import sys, works; works.bench_on_ray(sys.argv[1])", str(tmp_path)],
        check=True,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        timeout=240,
    ).stdout.splitlines()
    assert lines[-1] == repr(Summary(2, 0, ()))
    # A starved cluster may lose an actor of its own accord, too; a cell is tried three times.
    assert any("its worker died; once more" in line for line in lines)
    ours, theirs = records(tmp_path)["prompt"], records(real)["prompt"]
    assert {**ours, "order": 0} == {**theirs, "order": 0}  # another grid: the same cell elsewhere in it


def test_an_unknown_executor_and_no_cell_are_refused(tmp_path: Path) -> None:
    grid, cells = planned(tmp_path)
    with pytest.raises(UsageError, match="unknown executor 'slurm'; known: local, ray"):
        bench(grid, cells, 1, "slurm")
    with pytest.raises(UsageError, match="no cell of 'grid' has 'none'"):
        plan(grid, tmp_path, tmp_path, tmp_path, only="none")


def test_the_prompt_yardstick_puts_the_solved_failure_first() -> None:
    example, row = Failure("a =", " 1", "x"), Failure("b =", " 2", "y", ("c =",))
    (made,) = solved_before([row], example)
    assert (made.prompt, made.paraphrases, made.target) == ("a = 1\nb =", ("a = 1\nc =",), " 2")
    chat = Failure("", "yes", "z", (), ({"role": "user", "content": "q"},))
    (made,) = solved_before([chat], chat)
    assert [message["role"] for message in made.messages] == ["user", "assistant", "user"]


def test_jobs_hold_no_state(tmp_path: Path) -> None:
    _, cells = planned(tmp_path)
    assert isinstance(cells[0].job, Job)
    assert cells[0].job == planned(tmp_path)[1][0].job


def test_the_commands(tmp_path: Path, run: Run, real: Path) -> None:
    grid, out = real / "grid.toml", real / "out"
    text = (real / "said").read_text(encoding="utf-8")
    assert "3 cells: 0 done, 3 to run" in text
    assert "all in" in text
    code, text, _ = run("bench", grid, "--output", out, "--only", "prompt", "--json")
    assert (code, json.loads(text)) == (0, {"run": 0, "skipped": 1, "failed": []})
    code, text, _ = run("report", out, "-o", tmp_path / "page.html", "--json")
    assert json.loads(text)["bytes"] == (tmp_path / "page.html").stat().st_size
    code, _, err = run("bench", grid, "--output", grid)
    assert code == 2
    assert "is a file" in err
    missing = made(tmp_path, GRID.replace('name = "embedded"', 'name = "none"\npath = "no/such/model"'))
    code, text, _ = run("bench", missing, "--output", tmp_path / "out", "--only", "prompt", "--threads", 1)
    assert code == 1
    assert "FAILED: ModelError: no/such/model" in text
