"""Rows in the forms that the field uses: told apart by their keys, read alike, refused by name."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings, strategies as st

from lmrepair import Failure, FailuresError, read_failures
from lmrepair.failures import read_protected
from lmrepair.failures.sources import DEEPEST

USER = {"role": "user", "content": "Add 1 and 2"}
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # form → a row of it, and what of the failure it must give
    "": ({"prompt": "a", "target": "b"}, {"prompt": "a", "target": "b"}),
    "OpenAI chat": (
        {"messages": [USER, {"role": "assistant", "content": "3"}], "tools": [{"type": "function"}]},
        {"messages": (USER,), "target": "3", "tools": ({"type": "function"},), "turn": None},
    ),
    "ShareGPT": (
        {"system": "Be brief", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        {
            "messages": ({"role": "system", "content": "Be brief"}, {"role": "user", "content": "hi"}),
            "target": "ho",
        },
    ),
    "Alpaca": ({"instruction": "Add", "input": "1 2", "output": "3"}, {"prompt": "Add\n1 2", "target": "3"}),
    "prompt and completion": ({"prompt": "a", "completion": " b"}, {"prompt": "a", "target": " b"}),
    "HumanEval": (
        {
            "task_id": "H/0",
            "prompt": "def f():\n",
            "canonical_solution": "    return 1\n",
            "test": "t",
            "entry_point": "f",
        },
        {"prompt": "def f():\n", "target": "    return 1\n", "id": "H/0"},
    ),
    "MBPP": (
        {"task_id": 7, "text": "Write f.", "code": "def f():\r\n  return 1", "test_list": ["assert f() == 1"]},
        {"prompt": '"""\nWrite f.\nassert f() == 1\n"""\n', "target": "def f():\n  return 1", "id": "7"},
    ),
    "question and answer": (
        {"id": "q", "title": "t", "context": "Ann is 7.", "question": "Age?", "answers": {"text": ["7", "seven"]}},
        {"prompt": "Question: Age?\nContext: Ann is 7.\nAnswer:", "target": " 7", "id": "q"},
    ),
}


def put(folder: Path, content: bytes | str, name: str = "rows") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_known_by_its_keys_and_said(
    form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, wanted = FORMS[form]
    with caplog.at_level(logging.INFO, "lmrepair"):
        found = read_failures(put(tmp_path, json.dumps(row), "alpaca.csv"))  # the name says nothing
    assert {name: getattr(found[0], name) for name in wanted} == wanted
    said = [record.getMessage() for record in caplog.records]
    assert [re.sub(r"(; not used: .*)?$", "", line, count=1) for line in said] == (
        [f"{tmp_path / 'alpaca.csv'}: read as {form}"] if form else []
    )
    # The same rows as an array, broken over lines, with a BOM and CRLF, and on standard input.
    array = json.dumps([row, {**row, "id": "second"}], indent=2).replace("\n", "\r\n").encode()
    assert [one.target for one in read_failures(put(tmp_path, b"\xef\xbb\xbf" + array))] == [found[0].target] * 2
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(row, indent=1).encode())))
    assert read_failures("-")[0].target == found[0].target


def test_files_of_several_forms_and_unread_keys_are_said_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row for row, _ in FORMS.values()]
    with caplog.at_level(logging.INFO, "lmrepair"):
        read_failures(put(tmp_path, "\n".join(map(json.dumps, rows))))
    (said,) = [record.getMessage() for record in caplog.records]
    assert "Alpaca (1)" in said
    assert said.endswith("not used: entry_point, test, title")


@pytest.mark.parametrize("between", [",", "\t", ";"])
def test_csv_is_known_by_its_header(between: str, tmp_path: Path) -> None:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=between)
    writer.writerow(["prompt", "target", "paraphrases", "id"])
    writer.writerow(["a,\t;b\nc", '"quoted"', '["other"]', ""])
    writer.writerow(["d", "007", "", "x"])
    writer.writerow(["e", "f", "", ""])
    found = read_failures(put(tmp_path, b"\xef\xbb\xbf" + out.getvalue().encode(), "rows.jsonl"))
    assert found == [
        Failure("a,\t;b\nc", '"quoted"', "1", ("other",)),
        Failure("d", "007", "x"),
        Failure("e", "f", "3"),
    ]


def test_csv_with_spaces_behind_its_commas_loses_them(tmp_path: Path) -> None:
    found = read_failures(put(tmp_path, 'prompt, target, tools\n"a", "b, c", \nd, " e",\n'))
    assert found == [Failure("a", "b, c", "1"), Failure("d", " e", "2")]
    assert read_failures(put(tmp_path, '"prompt", "target"\n"a", "b"\n')) == [Failure("a", "b", "1")]
    assert read_failures(put(tmp_path, "prompt,target\na, b\n")) == [Failure("a", " b", "1")]


def test_a_header_may_have_capitals(tmp_path: Path) -> None:
    found = read_failures(put(tmp_path, 'ID;Prompt;TARGET;Paraphrases\nx;A;B;"[""C""]"\n'))
    assert found == [Failure("A", "B", "x", ("C",))]
    with pytest.raises(FailuresError, match="two columns are called 'prompt'"):
        read_failures(put(tmp_path, "Prompt,prompt,target\na,b,c\n"))


@pytest.mark.parametrize(
    ("content", "name", "line"),
    [
        ("sep=;\nprompt;target\na;b\n", "rows", "sep=;"),
        ("prompt|target\r\na|b\r\n", "rows", "prompt|target"),
        ("Prompt,Target\ra,b\r", "rows", "Prompt,Target\ra,b"),
        ("asked,wanted\na,b\n", "rows.CSV", "asked,wanted"),
        ("asked\twanted\na\tb\n", "rows.tsv", "asked\twanted"),
    ],
)
def test_what_looks_like_csv_is_told_what_a_header_needs(content: str, name: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(FailuresError) as caught:
        read_failures(put(tmp_path, content, name))
    assert str(caught.value) == (
        f"{tmp_path / name}: the first line, {line!r}, is no header of a CSV; expected names of columns such as "
        "prompt,target, with commas, tabs or semicolons between them, and LF or CRLF at the ends of lines"
    )


def test_a_broken_array_is_placed_by_line_and_column(tmp_path: Path) -> None:
    content = '[\n  {"prompt": "a", "target": "b"}\n  {"prompt": "c", "target": "d"}\n]\n'
    with pytest.raises(FailuresError) as caught:
        read_failures(put(tmp_path, content))
    assert str(caught.value) == (
        f"{tmp_path / 'rows'}, line 3, column 3: broken JSON (Expecting ',' delimiter); "
        "expected a list of objects, [{…}, {…}]"
    )


def test_broken_json_in_a_cell_is_placed_by_its_column(tmp_path: Path) -> None:
    with pytest.raises(FailuresError) as caught:
        read_failures(put(tmp_path, "prompt,target,paraphrases\na,b,[c]\n"))
    assert str(caught.value) == (
        f"{tmp_path / 'rows'}, line 2, paraphrases: broken JSON (Expecting value); expected a list or an object"
    )


FUNCTION = {"name": "add", "parameters": {}}
WITH_FUNCTIONS: dict[str, dict[str, Any]] = {
    "our own": {"messages": [USER], "target": "3"},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Add 1 and 2"}, {"from": "gpt", "value": "3"}]},
    "prompt and completion": {"prompt": [USER], "completion": [{"role": "assistant", "content": "3"}]},
    "prompt and response": {"prompt": [USER], "response": "3"},
}


@pytest.mark.parametrize("form", WITH_FUNCTIONS)
def test_functions_are_tools_in_every_form_of_chats(form: str, tmp_path: Path) -> None:
    row = {**WITH_FUNCTIONS[form], "functions": [FUNCTION], "tools": [{"type": "function"}]}
    (found,) = read_failures(put(tmp_path, json.dumps(row)))
    assert found.tools == ({"type": "function"}, {"type": "function", "function": FUNCTION})
    assert (found.messages, found.target) == ((USER,), "3")


@pytest.mark.parametrize("key", ["tools", "functions", "chat_template_kwargs"])
def test_what_only_a_chat_can_use_is_refused_beside_a_text(key: str, tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b", key: {"a": 1} if key == "chat_template_kwargs" else [FUNCTION]}
    with pytest.raises(FailuresError, match=f"line 1: {key} needs messages"):
        read_failures(put(tmp_path, json.dumps(row)))


def test_functions_may_stand_in_a_cell(tmp_path: Path) -> None:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["messages", "target", "functions"])
    writer.writerow([json.dumps([USER]), "3", json.dumps([FUNCTION])])
    (found,) = read_failures(put(tmp_path, out.getvalue()))
    assert found.tools == ({"type": "function", "function": FUNCTION},)


def test_parquet_rows_lose_the_nulls_of_other_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra parquet")
    from pyarrow import parquet

    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    rows = [{"messages": [USER, call], "target": None}, {"messages": [USER], "target": "3"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows")
    first, second = read_failures(tmp_path / "rows")
    assert first.turn == {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    assert (first.messages, second.messages, second.target) == ((USER,), (USER,), "3")
    with pytest.raises(FailuresError, match="damaged Parquet"):
        read_failures(put(tmp_path, (tmp_path / "rows").read_bytes()[:-9]))


def test_parquet_without_the_extra_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(FailuresError, match=r"pip install 'lmrepair\[parquet\]'"):
        read_failures(put(tmp_path, b"PAR1"))


SPOILED: dict[str, tuple[bytes, str]] = {
    "UTF-16": (json.dumps(FORMS[""][0]).encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
    "UTF-16 without a mark": (json.dumps(FORMS[""][0]).encode("utf-16-le"), "iconv -f UTF-16LE -t UTF-8"),
    "UTF-16, big end first": (json.dumps(FORMS[""][0]).encode("utf-16-be"), "iconv -f UTF-16BE -t UTF-8"),
    "packed": (b"\x1f\x8b\x08", "unpack it first"),
    "5,000 digits": (b'{"prompt": "a", "target": "b", "id": ' + b"9" * 5000 + b"}", "more than 4300 digits"),
    "deep": (b'{"prompt": "a", "target": "b", "meta": ' + b"[" * 200 + b"]" * 200 + b"}", "more than 100 deep"),
    "a key twice": (b'{"prompt": "a", "target": "b", "target": "c"}', "the key 'target' twice"),
    "surrogate in the id": (rb'{"prompt": "a", "target": "b", "id": "\udc00"}', "id has half of a surrogate"),
    "surrogate in a key": (rb'{"prompt": "a", "target": "b", "\udc00": 1}', "has half of a surrogate pair"),
    "surrogate in a chat": (rb'{"messages": [{"role": "user", "content": "\ud800"}], "target": "b"}', "half of a surr"),
    "near key": (b'{"messages": [], "target": "b", "tool": []}', "unknown key 'tool' (did you mean 'tools'?)"),
    "strange keys": (b'{"a": 1, "b": 2}', "unknown key 'a' (known: "),
    "near key of a form": (b'{"instruction": "a", "output": "b", "inputs": "c"}', "did you mean 'input'?"),
    "cells": (b"prompt,target\na,b,c\n", "line 2: 3 cells for 2 columns"),
    "quotes": (b'prompt,target\na,"b\n', "broken CSV"),
    "columns": (b"prompt,target,target\na,b,c\n", "two columns are called 'target'"),
    "no turn of an assistant": (b'{"messages": [{"role": "user", "content": "a"}]}', "ends with the role 'user'"),
    "no question": (b'{"messages": [{"role": "assistant", "content": "a"}]}', "nothing that is asked"),
    "no text to go on from": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null}], "target": "b"}',
        "no text to go on from",
    ),
    "no answer": (b'{"question": "a", "answers": {"text": []}}', "answers is empty"),
    "speaker": (b'{"conversations": [{"from": "humann", "value": "a"}]}', "did you mean 'human'?"),
    "tools without a chat": (b'{"prompt": "a", "target": "b", "tools": [{}]}', "tools needs messages"),
    "settings": (
        b'{"messages": [{"role": "user", "content": "a"}], "target": "b", "chat_template_kwargs": 1}',
        "expected an object",
    ),
    "text": (b"hello\nworld\n", "line 1: broken JSON"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILED)
def test_spoiled_rows_are_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    content, said = SPOILED[kind]
    with pytest.raises(FailuresError) as caught:
        read_failures(put(tmp_path, content))
    assert said in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = ["prompt", "target", "messages", "conversations", "instruction", "input", "output", "completion", "question"]
KEYS += ["answers", "answer", "context", "code", "text", "test_list", "canonical_solution", "history", "system", "id"]
KEYS += ["paraphrases", "tools", "functions", "chat_template_kwargs", "length", "response"]
TURNS = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "from", "value", "tool_calls"]), JSON | st.just("user")),
    max_size=3,
)


@settings(deadline=None, max_examples=150)
@example({"conversations": [{"role": []}]}, False)
@given(st.dictionaries(st.sampled_from(KEYS), JSON | TURNS, min_size=1, max_size=5), st.booleans())
@example({"conversations": [{"from": [], "value": "x"}]}, False)
def test_whatever_a_row_holds_it_is_read_or_refused_in_one_line(row: dict[str, Any], protected: bool) -> None:
    path = _SCRATCH / "row.json"
    path.write_text(json.dumps([row]), encoding="utf-8")
    try:
        found = [one.failure for one in read_protected(path)] if protected else read_failures(path)
    except FailuresError:
        return
    assert len(found) == len({*found}) == 1
    assert isinstance(found[0].shown + found[0].asked + found[0].target + found[0].id, str)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=40))
def test_whatever_bytes_a_file_holds_they_are_refused_in_one_line(content: bytes) -> None:
    path = _SCRATCH / "bytes"
    path.write_bytes(content)
    with pytest.raises(FailuresError):
        read_failures(path)


@pytest.fixture(autouse=True, scope="module")
def _scratch(tmp_path_factory: pytest.TempPathFactory) -> None:
    global _SCRATCH  # noqa: PLW0603
    _SCRATCH = tmp_path_factory.mktemp("rows")


_SCRATCH = Path()


def test_levels_up_to_the_limit_are_read(tmp_path: Path) -> None:
    inner = "[" * DEEPEST + "1" + "]" * DEEPEST
    row = '{{"prompt": "a", "target": "b", "meta": {}}}'
    assert len(read_failures(put(tmp_path, row.format(inner)))) == 1
    with pytest.raises(FailuresError, match=f"meta is nested more than {DEEPEST} deep; expected less"):
        read_failures(put(tmp_path, row.format(f"[{inner}]")))


def test_protected_rows_may_leave_their_target_out(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "length": 3},
        {"messages": [USER, {"role": "assistant", "content": "3"}]},
        {"instruction": "a", "output": "b"},
    ]
    bare, chat, alpaca = read_protected(put(tmp_path, "\n".join(map(json.dumps, rows))))
    assert (bare.failure.target, bare.length) == ("", 3)
    assert (chat.failure.target, chat.failure.messages) == ("3", (USER,))
    assert alpaca.failure.target == "b"


def test_a_prompt_becomes_a_users_turn_on_request(tmp_path: Path) -> None:
    path = put(tmp_path, json.dumps({**FORMS["question and answer"][0], "paraphrases": ["How old?"]}))
    (found,) = read_failures(path, chat=True)
    assert found.messages == ({"role": "user", "content": "Age?\nContext: Ann is 7."},)
    assert (found.target, found.otherwise()[0].asked) == ("7", "How old?")
