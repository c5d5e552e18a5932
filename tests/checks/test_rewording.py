"""Other wordings by rule, and that their tests still decide."""

from __future__ import annotations

from lmrepair.checks import Checker, Task, reworded

PROMPT = '''def half(x):
    """Return x by two.

    >>> half(4)
    2.0
    >>> half(1)
    0.5
    """
'''
TASK = Task("t", PROMPT, "assert half(6) == 3\nassert half(0) == 0\n", "half", "    return x / 2\n")


def test_the_rules() -> None:
    found = reworded(TASK)
    assert set(found) == {"docstring", "renamed", "examples"}
    assert found["docstring"].prompt == PROMPT.replace("Return x", "Give back x")
    assert found["renamed"].prompt == PROMPT.replace("half(", "do_half(")
    assert found["renamed"].canonical == TASK.canonical
    assert found["examples"].prompt.index("half(1)") < found["examples"].prompt.index("half(4)")
    assert sorted(found["examples"].prompt) == sorted(PROMPT)


def test_a_rule_that_changes_nothing_is_left_out() -> None:
    assert reworded(Task("t", "x = ", "", stop="")) == {}
    assert set(reworded(Task("t", "def half(x):\n", "assert half(2) == 1"))) == {"renamed"}
    chat = Task("t", "", "", messages=({"role": "user", "content": PROMPT},), joined=False)
    assert reworded(chat) == {}


def test_other_wordings_are_held_against_the_same_tests(checker: Checker) -> None:
    for other in reworded(TASK).values():
        assert checker.check(other, other.canonical).passed
        assert checker.check(other, "    return x\n").kind == "wrong"
    check = Task(
        "t", PROMPT, "def check(candidate):\n    assert candidate(6) == 3\n", "half", calls=(("half", "half"),)
    )
    assert checker.check(reworded(check)["renamed"], "    return x / 2\n").passed


def test_a_recursive_solution_keeps_its_name() -> None:
    task = Task("t", "def f(n):\n", "assert f(3) == 6", "f", "    return 1 if n < 2 else n * f(n - 1)\n")
    assert "do_f(n - 1)" in reworded(task)["renamed"].canonical
