"""From failing to passing, on the model that ships: what is aimed at, what is protected, what is reported."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from command import Run, write

from lmrepair import Gate, MinKl, Net, Reference, load
from lmrepair.checks import Budget, Checker, Task, Verdict, Written, fix, fixing, search
from lmrepair.errors import UsageError

AREA = "def area(width, height):\n    return "
ROWS = [
    {"task_id": "area", "prompt": AREA, "check": "assert area(2, 3) == 6\n", "stop": "\n",
     "canonical_solution": "width * height\n"},
    {"task_id": "kept", "prompt": "def name():\n    return ", "check": "$ cat", "stop": "\n"},
    {"task_id": "far", "prompt": "def far(x):\n    return ", "check": "assert far(2) == 'no model'\n", "stop": "\n"},
]  # fmt: skip
TASKS = [
    Task("area", AREA, "assert area(2, 3) == 6\n", "area", "width * height\n", "\n"),
    Task("kept", "import os\n\nname = ", "", stop="\n", shell="cat"),
    Task("far", "def far(x):\n    return ", "assert far(2) == 'no model'\n", "far", "", "\n"),
]


@pytest.fixture(scope="module")
def net() -> Net:
    return load()


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[Sequence[str]]], list[float]]:
    """Let the model sample what is given, a round at a time; gives the temperatures that were asked for."""

    def give(rounds: Sequence[Sequence[str]]) -> list[float]:
        heats: list[float] = []
        waiting = iter(rounds)

        def samples(
            net: Net, tasks: Sequence[Task], count: int, length: int, temperature: float, seeds: Sequence[int]
        ) -> list[list[Written]]:
            heats.append(temperature)
            return [[Written(text, "\n", 3) for text in next(waiting, ("None",))] for _ in tasks]

        monkeypatch.setattr(fixing, "write_samples", samples)
        return heats

    return give


def test_temperatures_rise_until_some_sample_passes(net: Net, checker: Checker, sampled: Callable) -> None:
    heats = sampled([["0", "width"], ["height * width", "width * height", "0"]])
    (found,) = search(net, TASKS[:1], checker, Budget(12, 600, (0.2, 0.7, 1.0), at_once=4), [0])
    assert heats == [0.2, 0.7]
    assert found.source == "sample"
    assert found.temperature == 0.7
    assert (found.passing, found.samples) == (2, 8)
    likely = dict(zip(("height * width\n", "width * height\n"), fixing.nats(net, [TASKS[0]] * 2,
                  ["height * width\n", "width * height\n"]), strict=True))  # fmt: skip
    assert found.target == min(likely, key=lambda text: likely[text])
    assert found.nats == min(likely.values())
    assert {text for text, _ in found.rejected} == {"0", "width"}


def test_without_a_passing_sample_the_given_solution_is_aimed_at(net: Net, checker: Checker, sampled: Callable) -> None:
    heats = sampled([["0"]])
    (found,) = search(net, TASKS[:1], checker, Budget(4, 600, (0.5, 1.0), at_once=2), [0])
    assert (found.target, found.source, found.samples) == ("width * height\n", "canonical", 4)
    assert heats == [0.5, 1.0]
    heats.clear()
    assert search(net, TASKS[:1], checker, Budget(), [0], canonical=True)[0].source == "canonical"
    assert heats == []
    assert search(net, TASKS[2:], checker, Budget(0), [0])[0].target is None


def test_tasks_are_looked_for_side_by_side_until_each_is_found_or_its_budget_spent(
    net: Net, checker: Checker, sampled: Callable
) -> None:
    heats = sampled([["0"], ["1"], ["width * height"], ["2"], ["3"]])
    area, far = search(net, [TASKS[0], TASKS[2]], checker, Budget(3, 600, (0.5, 1.0, 1.5), at_once=1), [0, 9])
    assert heats == [0.5, 1.0, 1.5]
    assert (area.target, area.temperature, area.samples) == ("width * height\n", 1.0, 2)
    assert (far.target, far.samples, [text for text, _ in far.rejected]) == (None, 3, ["1", "2", "3"])


def test_a_fix_repairs_in_execution_protects_what_passed_and_says_what_is_out_of_reach(
    net: Net, checker: Checker
) -> None:
    before = [net.columns(layer).clone() for layer in range(net.layers)]
    reference = Reference("text", ("for i in range(10):\n    print(i)\n",))
    seen: set[str] = set()
    result = fix(
        net, TASKS, checker, Budget(0, length=24), MinKl(), Gate(math.inf), reference,
        {"held_out": [TASKS[1]]}, progress=lambda stage, done, total: seen.add(stage),
    )  # fmt: skip
    area, kept, far = result.items
    assert (area.in_reach, area.repaired, area.after.written.completion) == (True, True, "width * height")
    assert set(area.others) == {"renamed"}
    assert (kept.search, kept.broken, kept.after.written) == (None, False, kept.before.written)
    assert not far.in_reach
    assert "out of reach" in far.reason
    assert result.all_right
    assert result.groups["held_out"][0][0] is TASKS[1]
    assert {"write", "execute", "search"} <= seen
    assert set(result.seconds) == {"find", "search", "execute", "repair"}
    assert result.repair is not None
    assert result.repair.gate is not None
    assert result.repair.gate.data()["protected"] == 1
    assert result.repair.patch is not None
    result.repair.patch.revert(net)
    assert all(bool((net.columns(layer) == kept).all()) for layer, kept in enumerate(before))


def test_nothing_in_reach_leaves_the_net_as_it_was(net: Net, checker: Checker) -> None:
    result = fix(net, TASKS[2:], checker, Budget(0, length=8))
    assert result.repair is None
    assert result.all_right
    assert result.items[0].after is result.items[0].before


@pytest.mark.parametrize("wrong", [{"temperatures": ()}, {"temperatures": (0.0,)}, {"samples": -1}, {"seconds": 0}])
def test_budgets_that_are_none_are_refused(wrong: dict) -> None:
    with pytest.raises(UsageError, match="expected"):
        Budget(**wrong)


def test_the_command_fix(run: Run, tmp_path: Path, checker: Checker) -> None:
    path = write(tmp_path / "tasks.jsonl", *ROWS)
    code, out, _ = run(
        "fix", path, "--samples", 0, "--length", 24, "--max-kl", "inf", "--json", "--output", "a.st"
    )  # fmt: skip
    data = json.loads(out)
    assert code == 0
    assert (data["tasks"], data["in_reach"], data["repaired"], data["broken"]) == (3, 1, 1, 0)
    assert data["passing_after"] == data["passing_before"] + 1
    assert Path(data["patch"]).exists()
    item = data["items"][0]
    assert item["target"] == {"text": "width * height\n", "source": "canonical", "nats": item["target"]["nats"]}
    assert item["after"]["outcome"]["kind"] == "passed"
    assert set(data) >= {"drift", "cost", "gate", "other_wordings", "sandbox", "model"}
    item["target"]["text"] = "height * width\n"
    (tmp_path / "earlier.json").write_text(json.dumps(data), encoding="utf-8")
    code, out, _ = run(
        "fix", path, "--answers", tmp_path / "earlier.json", "--length", 24, "--max-kl", "inf", "--json", "--output",
        "b.st", "--limit", 1, "--method", "finetune",
    )  # fmt: skip
    again = json.loads(out)
    assert (code, again["method"], again["cost"]["samples"], again["repaired"]) == (0, "finetune", 0, 1)
    assert again["items"][0]["after"]["completion"] == "height * width"
    for content, said in (("{", "found no result of fix (JSONDecodeError"), ('{"items": []}', "found no answers")):
        (tmp_path / "x.json").write_text(content, encoding="utf-8")
        code, _, err = run("fix", path, "--answers", tmp_path / "x.json")
        assert code == 2
        assert said in err


def test_the_command_check(run: Run, tmp_path: Path, checker: Checker) -> None:
    path = write(tmp_path / "tasks.jsonl", *ROWS)
    rows = [{"task_id": row["task_id"], "completion": text} for row, text in zip(ROWS, ("width * height", "1", "("),
            strict=True)]  # fmt: skip
    given = write(tmp_path / "completions.jsonl", *rows)
    code, out, _ = run("check", path, "--completions", given)
    assert code == 1
    assert "passed     2 of 3, pass@1 66.7%" in out
    assert "syntax" in out
    code, out, _ = run("check", path, "--completions", given, "--forbid", "... * ...", "--json")
    data = json.loads(out)
    assert data["outcomes"] == {"forbidden": 1, "passed": 1, "syntax": 1}
    assert data["items"][0]["outcome"]["detail"] == "line 2: ... * ..."
    code, _, err = run("check", path, "--completions", write(tmp_path / "none.jsonl", rows[0]))
    assert code == 2
    assert "no completion of 'kept'" in err
    code, _, err = run("fix", path, "--temperatures", "warm")
    assert code == 2
    assert "expected numbers" in err


def test_verdicts_as_data() -> None:
    assert Verdict("exception", "KeyError: 1").label == "KeyError"
    assert Verdict("passed", "", 0.25).data() == {"kind": "passed", "detail": "", "seconds": 0.25}
