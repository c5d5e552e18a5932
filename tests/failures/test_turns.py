"""Chats in others' forms, turn by turn: what each key of a row becomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmrepair.errors import FailuresError
from lmrepair.failures import Failure, read_failures


def read(tmp_path: Path, row: dict[str, Any]) -> Failure:
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    (found,) = read_failures(path)
    return found


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_alpaca_with_a_system_prompt_and_a_history_is_a_chat(tmp_path: Path) -> None:
    row = {"instruction": "add", "input": "1 2", "output": "3", "system": "be brief", "history": [["a", "b"]]}
    found = read(tmp_path, row)
    asked = (turn("system", "be brief"), turn("user", "a"), turn("assistant", "b"), turn("user", "add\n1 2"))
    assert (found.messages, found.target, found.prompt) == (asked, "3", "")
    found = read(tmp_path, {"instruction": "add", "context": "1 2", "response": "3", "system": "be brief"})
    assert (found.messages, found.target) == ((asked[0], asked[3]), "3")
    found = read(tmp_path, {"instruction": "add", "response": "3", "history": [["a", "b"]]})
    assert found.messages == (asked[1], asked[2], turn("user", "add"))


def test_sharegpt_turns_by_either_name_with_settings_for_the_template(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {
        "conversations": [{"role": "user", "content": "q"}, {"from": "gpt", "value": "a"}],
        "system": "s",
        "tools": tools,
        "chat_template_kwargs": {"thinking": False},
    }
    found = read(tmp_path, row)
    assert (found.messages, found.target) == ((turn("system", "s"), turn("user", "q")), "a")
    assert (found.tools, found.chat_template_kwargs) == (tuple(tools), {"thinking": False})


def test_sharegpts_calls_are_calls_of_functions(tmp_path: Path) -> None:
    call = {"name": "f", "arguments": {"a": 1}}
    asked = {"from": "human", "value": "q"}
    for value in (call, [call]):
        row = {"conversations": [asked, {"from": "function_call", "value": json.dumps(value)}]}
        found = read(tmp_path, row)
        assert found.turn == {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}


def test_a_prompt_and_a_completion_that_are_lists_of_turns(tmp_path: Path) -> None:
    found = read(tmp_path, {"prompt": [turn("user", "q")], "completion": [turn("assistant", "a")]})
    assert (found.messages, found.target) == ((turn("user", "q"),), "a")
    found = read(tmp_path, {"prompt": [turn("user", "q")], "completion": "a"})
    assert (found.messages, found.target) == ((turn("user", "q"),), "a")


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([{"from": [], "value": "x"}], "line 1, turn 1: from is []; "),
        ([{"from": "human", "value": 1}], "line 1, turn 1: value is a number; expected text"),
        (
            [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{"}],
            "line 1, turn 2: the function call is no JSON; expected name and arguments",
        ),
    ],
)
def test_turns_that_are_none_are_placed(tmp_path: Path, turns: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(FailuresError) as found:
        read(tmp_path, {"conversations": turns})
    assert str(found.value).startswith(f"{tmp_path / 'f.jsonl'}, {said}")
