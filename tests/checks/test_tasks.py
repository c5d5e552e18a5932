"""Tasks from files: the field's forms by their keys, stop rules, programs, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from command import write

from lmrepair.checks import Task, read_task, read_tasks
from lmrepair.errors import FailuresError

PROMPT = 'from math import pi\n\n\ndef half(x):\n    """Return half of x."""\n'
HUMAN_EVAL: dict[str, Any] = {
    "task_id": "HumanEval/0",
    "prompt": PROMPT,
    "entry_point": "half",
    "canonical_solution": "    return x / 2\n",
    "test": "def check(candidate):\n    assert candidate(4) == 2\n",
}
MBPP: dict[str, Any] = {
    "task_id": 2,
    "text": "Write a function to halve a number.",
    "code": "def half(x):\n    return x / 2\n",
    "test_list": ["assert half(4) == 2", "assert half(1) == 0.5"],
    "test_setup_code": "",
}
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks" / "tasks"


def task(**row: Any) -> Task:
    return read_task(row, 1, "here")


def test_human_eval_continues_its_prompt() -> None:
    found = task(**HUMAN_EVAL)
    assert (found.id, found.entry_point, found.canonical) == ("HumanEval/0", "half", "\n    return x / 2\n")
    # A tokenizer joins the line break with the indent behind it, so the completion begins with it.
    assert found.prompt == PROMPT.removesuffix("\n")
    assert found.program("\n    return 1").startswith(PROMPT + "    return 1")
    assert found.cut("\n    return 1\n\n\ndef other():\n") == "\n    return 1"
    assert found.cut("\n\ndef other():\n") == ""
    assert found.opened() == "half"
    assert found.helpers() == "from math import pi\n\n\n"
    assert task(prompt="def two():\n    return 2\n\n\ndef half(x):\n    return ", check="").helpers().count("def") == 1
    assert task(prompt="words that are no Python", check="").helpers() == ""


def test_mbpp_is_a_program_of_its_own() -> None:
    found = task(**MBPP)
    assert found.id == "2"
    assert "halve a number" in found.prompt
    assert "assert half(4) == 2" in found.prompt
    assert "assert half(1)" not in found.prompt
    assert found.program("x = 1") == "x = 1\n"
    assert found.cut("def half(x):\n    return 1\n\nassert half(4) == 2\n") == "def half(x):\n    return 1"


@pytest.mark.parametrize(
    ("written", "cut"),
    [
        ("\n    return 1\n\n\ndef other():\n", "\n    return 1"),
        ("\n    return 1\n\n    return 2\nprint(3)", "\n    return 1\n\n    return 2"),
        ("\n    return 1\n", "\n    return 1\n"),
        ("\n```\n", ""),
        ("\nreturn 1\n", ""),
        ("    # it halves\n    return 1\nprint(3)", "    # it halves\n    return 1"),
    ],
)
def test_a_body_ends_where_the_indentation_does(written: str, cut: str) -> None:
    assert task(prompt=PROMPT, check="").cut(written) == cut


def test_own_rows_with_code_commands_and_chats() -> None:
    own = task(prompt=PROMPT, check="assert half(2) == 1", imports="import os", id="mine")
    assert own.program("\n    return 1") == "import os\n" + PROMPT + "    return 1\n"
    shell = task(prompt="# a\n", check="$ python {file}")
    assert (shell.shell, shell.tests) == ("python {file}", "")
    chat = task(messages=[{"role": "user", "content": "half?"}], check="assert half(2) == 1")
    assert chat.program("Sure:\n```python\ndef half(x): return x / 2\n```\nDone.") == "def half(x): return x / 2\n\n"
    assert chat.cut("anything\nat all") == "anything\nat all"
    assert task(prompt="# a\n", check="", stop="END").cut("x END y") == "x "


def test_a_line_break_that_ends_a_prompt_is_the_completions() -> None:
    for breaks in ("\n", "\n\n"):
        found = task(prompt="# a" + breaks, check="$ cat", stop="\n", canonical_solution="x = 1\n")
        assert (found.prompt, found.lead, found.canonical) == ("# a", breaks, breaks + "x = 1\n")
        assert found.cut(breaks + "x = 1\ny = 2") == breaks + "x = 1"
        assert found.program(found.canonical) == "# a" + breaks + "x = 1\n\n"
        assert found.code(found.canonical) == "x = 1\n"  # what a command gets
    assert task(prompt="import os\n", check="").cut("\nprint(1)\nprint(2)") == "\nprint(1)"
    assert task(prompt="a", check="").lead == ""
    assert task(prompt="\n", check="").prompt == "\n"


def test_a_canonical_solution_is_indented_to_its_prompt() -> None:
    found = task(prompt=PROMPT, check="", canonical_solution="y = x\nreturn y / 2\n")
    assert found.canonical == "\n    y = x\n    return y / 2\n"
    assert task(prompt="# half\n", check="", canonical_solution="def half(): 0\n").canonical == "\ndef half(): 0\n"
    assert task(prompt=PROMPT, check="").canonical == ""


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "found keys prompt; expected HumanEval"),
        ({"prompt": 1, "check": ""}, "prompt is no text"),
        ({"prompt": "a", "messages": [], "check": ""}, "found keys"),
        ({"messages": [{"role": "user"}], "check": ""}, "messages is not a list"),
        ({"prompt": "a", "check": "assert ("}, "the tests are not Python"),
        ({"prompt": "a", "check": "", "imports": "import"}, "the imports are not Python"),
        ({"prompt": "a", "check": "", "stop": "("}, "stop is no regular expression"),
        ({"text": "a", "test_list": "assert"}, "test_list is no list"),
    ],
)
def test_rows_that_are_none_are_refused_with_the_line(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(FailuresError, match=message) as error:
        read_tasks(write(tmp_path / "tasks.jsonl", row))
    assert "line 1" in str(error.value)


def test_files_plain_and_gzipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in (HUMAN_EVAL, MBPP)).encode()))
    assert [one.id for one in read_tasks(path)] == ["HumanEval/0", "2"]
    assert len(read_tasks(path, 1)) == 1
    with pytest.raises(FailuresError, match="used before"):
        read_tasks(write(tmp_path / "b.jsonl", MBPP, MBPP))
    with pytest.raises(FailuresError, match="no tasks in it"):
        read_tasks(write(tmp_path / "c.jsonl"))
    path.write_bytes(b"no gzip")
    with pytest.raises(FailuresError, match="cannot be read"):
        read_tasks(path)


@pytest.mark.parametrize(("prefix", "count"), [("", 60), ("easy_", 40)])
def test_the_committed_tasks_come_with_other_wordings_and_as_many_held_out(prefix: str, count: int) -> None:
    repair, held, words = (read_tasks(BENCHMARKS / f"{prefix}{n}.jsonl") for n in ("repair", "held_out", "wordings"))
    names = {one.entry_point for one in (*repair, *held)}
    assert len(repair) == len(held) == count
    assert len(names) == 2 * count
    assert {one.id for one in words} == {one.id for one in repair}
    assert not {one.entry_point for one in words} & names
    for one in (*repair, *held, *words):
        exec(one.program(one.canonical) + one.tests, {})  # noqa: S102 - ours; a test that fails raises
