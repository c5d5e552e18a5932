"""Rows in their corners: whole words of refusals, what a chat keeps, and what a call of tools becomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmrepair.errors import FailuresError
from lmrepair.failures import Failure, Template, read_failures, read_lines, read_protected


def refused(tmp_path: Path, row: dict[str, Any]) -> str:
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(FailuresError) as found:
        read_failures(path)
    return str(found.value).removeprefix(f"{path}, ")


def test_a_prompt_in_chat_is_no_prompt_any_more() -> None:
    made = Failure("ask", "x", "1").in_chat()
    assert (made.prompt, made.messages) == ("", ({"role": "user", "content": "ask"},))
    assert made.in_chat() is made


def test_another_wording_is_a_failure_of_its_own_without_wordings() -> None:
    chat = ({"role": "user", "content": "asked"},)
    worded = Failure("ask", "x", "1", ("tell", chat)).otherwise()
    assert worded == [Failure("tell", "x", "1"), Failure("", "x", "1", (), chat)]


def test_broken_json_is_said_in_the_parsers_words_alone(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text('{"prompt": }\n', encoding="utf-8")
    with pytest.raises(FailuresError) as found:
        read_failures(path)
    assert str(found.value) == f"{path}, line 1: broken JSON (Expecting value); expected one object a line"


def test_a_chat_takes_no_template() -> None:
    with pytest.raises(FailuresError) as found:
        Failure("", "x", "7", (), ({"role": "user", "content": "ask"},)).wrapped(Template.parse("{prompt}{target}"))
    assert str(found.value) == (
        "failure '7' has messages, which the tokenizer's chat template renders; leave --template out, or give prompts"
    )


def test_a_call_of_tools_keeps_its_characters(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"city": "日"}}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    (found,) = read_failures(path)
    assert found.target == json.dumps([call], ensure_ascii=False)
    assert "日" in found.target


CHAT = Failure("", "b", "1", messages=({"role": "user", "content": "q"},))
Q: dict[str, Any] = {"role": "user", "content": "q"}
EMPTY: dict[str, Any] = {"role": "assistant", "content": ""}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": [{"role": "user", "contnet": "x"}], "target": "y"}, "message 1 has no content (is it 'contnet'?)"),
    ({"messages": [{"role": "user", "zzzz": "x"}], "target": "y"}, "message 1 has no content"),
    ({"target": "y"}, "no prompt; expected one of prompt and messages"),
    ({"prompt": "x", "target": ""}, "the target is empty; expected the right completion"),
    ({"prompt": 1, "target": "y"}, "prompt is a number; expected text"),
    ({"prompt": "x", "target": "y", "id": True}, "id is true or false; expected text or a whole number"),
    (
        {"prompt": "x", "target": "y", "tools": [{}]},
        "tools needs messages, for a chat template to read it; found a prompt",
    ),
    (
        {"messages": [Q]},
        "no target, and messages ends with the role 'user'; expected the right completion as text",
    ),
    ({"messages": [EMPTY]}, "messages has an answer and nothing that is asked; expected a user turn first"),
    (
        {"prompt": "a", "messages": [], "target": "y"},
        "both prompt and messages; expected one of prompt and messages",
    ),
    (
        {"messages": [Q, EMPTY]},
        "the assistant turn at the end of messages is empty; expected the right answer",
    ),
    (
        {"messages": [Q, EMPTY], "target": "y"},
        "messages ends with an assistant turn that has no text to go on from, and there is a target; "
        "leave one of them out",
    ),
    (
        {"messages": [Q], "target": "y", "tools": "["},
        "tools is a text that is no JSON; expected a list of objects",
    ),
    ({"messages": [Q], "target": "y", "tools": 3}, "tools is a number; expected a list of objects"),
    ({"messages": [Q], "target": "y", "functions": 3}, "functions is a number; expected a list of objects"),
    (
        {"messages": [Q], "target": "y", "chat_template_kwargs": 3},
        "chat_template_kwargs is a number; expected an object",
    ),
    (
        {"prompt": "x", "target": "y", "paraphrases": 3},
        "paraphrases is a number; expected a list of texts, or of messages",
    ),
    ({"messages": 3, "target": "y"}, "messages is not a list of {role, content} objects"),
    (
        {"messages": [{"content": 3}], "target": "y"},
        "message 1 has no role; expected system, user, assistant or tool",
    ),
    (
        {"messages": [{"role": "user", "content": 3}], "target": "y"},
        "content of message 1 is a number; messages is not a list of {role, content} objects with texts or parts",
    ),
]


@pytest.mark.parametrize(("row", "said"), REFUSED, ids=str)
def test_what_is_refused_is_said_in_whole_words(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    assert refused(tmp_path, row) == f"line 1: {said}"


def test_objects_over_several_lines_are_placed(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text('{\n"prompt": "a",\n"target": "b"}\n{\n"prompt": 1,\n"target": "b"}\n', encoding="utf-8")
    with pytest.raises(FailuresError) as found:
        read_failures(path)
    assert str(found.value) == f"{path}, line 4: prompt is a number; expected text"


def test_ids_left_out_count_objects_however_they_are_broken_into_lines(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    rows = [{"prompt": letter, "target": "x"} for letter in "abc"]
    one, two, three = map(json.dumps, rows)
    broken = one.replace(", ", ",\n")
    for text in (
        f"{broken} {two} {three}",
        f"\n\n{one}\n\n{two}\n{three}",
        "\n".join(json.dumps(row, indent=1) for row in rows),
    ):
        path.write_text(text, encoding="utf-8")
        assert [(one.prompt, one.id) for one in read_failures(path)] == [("a", "1"), ("b", "2"), ("c", "3")]
    path.write_text(f'\n{one}\n\n{{"prompt": "b", "target": ""}}\n', encoding="utf-8")
    with pytest.raises(FailuresError, match="line 4: the target is empty"):
        read_failures(path)
    assert [line for line, _ in read_lines(path)] == [2, 4]


NULLS: list[tuple[dict[str, Any], Failure]] = [
    ({"prompt": "a", "target": "b", "id": None, "paraphrases": None, "tools": None}, Failure("a", "b", "1")),
    ({"prompt": "a", "messages": None, "target": "b"}, Failure("a", "b", "1")),
    ({"prompt": None, "messages": [{"role": "user", "content": "q"}], "target": "b"}, CHAT),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}], "target": None}, CHAT),
    ({"conversations": [{"from": "human", "value": "q"}], "target": "b", "system": None, "functions": None}, CHAT),
    ({"instruction": "a", "input": None, "output": "b", "system": None, "history": None}, Failure("a", "b", "1")),
    ({"instruction": "a", "context": None, "response": "b", "output": None}, Failure("a", "b", "1")),
    ({"prompt": "a", "completion": "b", "id": None, "functions": None}, Failure("a", "b", "1")),
    ({"prompt": "a", "canonical_solution": "b", "task_id": None}, Failure("a", "b", "1")),
    ({"text": "a", "code": "b", "test_list": None}, Failure('"""\na\n"""\n', "b", "1")),
    ({"question": "a", "context": None, "answer": "b"}, Failure("Question: a\nAnswer:", " b", "1")),
]


@pytest.mark.parametrize(("row", "wanted"), NULLS, ids=str)
def test_null_is_as_good_as_a_key_left_out(tmp_path: Path, row: dict[str, Any], wanted: Failure) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert read_failures(path) == [wanted]


def test_a_key_that_a_row_needs_is_refused_as_null(tmp_path: Path) -> None:
    for row, said in (
        ({"prompt": None, "target": "b"}, "prompt is null; expected text"),
        ({"instruction": "a", "output": None}, "target is null; expected text"),
        ({"conversations": None}, "conversations is null; expected a list of {from, value} objects"),
    ):
        assert refused(tmp_path, row) == f"line 1: {said}"


def test_a_protected_row_may_have_null_for_its_target_and_its_length(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "target": null, "length": 3}\n{"prompt": "a", "target": "b", "length": null}\n')
    short, told = read_protected(path, length=7)
    assert (short.failure.target, short.length) == ("", 3)
    assert (told.failure.target, told.length) == ("b", 7)


def test_one_token_of_an_answer_can_be_protected(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "length": 1}\n', encoding="utf-8")
    (found,) = read_protected(path)
    assert (found.length, found.failure.target) == (1, "")
