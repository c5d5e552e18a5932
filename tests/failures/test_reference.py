"""Reference text is read whole, named by what it holds, and apart by kind; what ships is found."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from lmrepair.errors import FailuresError
from lmrepair.failures import (
    Failure,
    Reference,
    named,
    read_kept,
    read_kinds,
    read_reference,
    shipped,
    write_atomically,
)


def digest(*texts: str) -> str:
    return hashlib.sha256(b"\0".join(text.encode("utf-8", "surrogatepass") for text in texts)).hexdigest()[:12]


def test_a_reference_is_named_by_its_kind_and_its_content() -> None:
    found = named("code", ["a = 1\n", "\ud800"])
    assert (found.name, found.texts) == (f"code@{digest('a = 1' + chr(10), chr(0xD800))}", ("a = 1\n", "\ud800"))


def test_what_ships_is_the_reference_when_none_is_named() -> None:
    path = shipped("reference.jsonl")
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(texts) > 1
    found = read_reference()
    assert (found.name, found.texts) == (f"default@{digest(*texts)}", tuple(texts))
    assert read_reference(path).name == f"reference.jsonl@{digest(*texts)}"
    assert sorted(text for kind in read_kinds() for text in kind.texts) == sorted(texts)


def test_texts_are_read_in_order_and_apart_by_kind(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    rows = [{"text": "one", "kind": "x"}, {"text": "two"}, {"text": "three", "kind": "x"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert read_reference(path).texts == ("one", "two", "three")
    assert read_reference(path, "mine").name == f"mine@{digest('one', 'two', 'three')}"
    kinds = [(kind.name, kind.texts) for kind in read_kinds(path)]
    assert kinds == [(f"x@{digest('one', 'three')}", ("one", "three")), (f"mixed@{digest('two')}", ("two",))]
    plain = tmp_path / "plain.txt"
    plain.write_text("é\n日\n", encoding="utf-8")
    assert read_reference(plain).texts == ("é\n日\n",)
    assert [kind.name.split("@")[0] for kind in read_kinds(plain)] == ["plain"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"prompt": "p", "target": "t"}\n{"prompt": "q", "target": "u"}\n'),
        ("a.json", '[{"prompt": "p", "target": "t"}, {"prompt": "q", "target": "u"}]'),
        ("a.csv", "prompt,target\np,t\nq,u\n"),
    ],
)
def test_what_is_to_stay_may_be_rows_with_answers(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    found = read_kept(path, "# {prompt}\n{target}\n")
    assert found == [Failure("# p\n", "t\n", "1"), Failure("# q\n", "u\n", "2")]
    (asked, _) = read_kept(path, chat=True, end_turn=False)
    assert isinstance(asked, Failure)
    assert asked.messages[0]["content"] == "p"
    assert not asked.end_turn


def test_text_that_is_missing_is_placed_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "one"}\n\n{"kind": "x"}\n', encoding="utf-8")
    with pytest.raises(FailuresError, match="line 4: no text"):
        read_reference(path)


def test_rows_of_mbpp_have_a_text_and_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "mbpp.jsonl"
    path.write_text(
        '{"task_id": 2, "text": "Write f.", "code": "def f(): pass", "test_list": ["f()"]}\n', encoding="utf-8"
    )
    (found,) = read_kept(path)
    assert isinstance(found, Failure)
    assert found.target.startswith("def f")


def test_or_text(tmp_path: Path) -> None:
    lines, plain = tmp_path / "a.jsonl", tmp_path / "a.py"
    lines.write_text('{"text": "one"}\n{"text": "two"}\n', encoding="utf-8")
    plain.write_text("x = 1\n", encoding="utf-8")
    assert read_kept(lines, "# {prompt}\n{target}") == read_reference(lines)
    found = read_kept(plain)
    assert isinstance(found, Reference)
    assert found.texts == ("x = 1\n",)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', ', line 2: no text; expected reference text as {"text": …}'),
        ("a.jsonl", b'{"text": "x", "kind": 1}\n', ", line 1: the kind is no text; expected a name, or none"),
        ("a.jsonl", b'{"text": " "}\n', ": no reference text in it"),
        ("a.txt", b" \n", ": no reference text in it"),
    ],
)
def test_what_is_no_reference_is_refused_in_whole_words(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(FailuresError) as refused:
        read_reference(path)
    assert str(refused.value) == f"{path}{said}"


def test_text_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xff")
    with pytest.raises(FailuresError, match="cannot be read as UTF-8 text") as refused:
        read_reference(path)
    assert str(refused.value).startswith(f"{path}: ")


def test_a_file_is_written_whole_with_the_users_mask_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    kept = os.umask(0o027)
    try:
        write_atomically(path, b"one")
        assert path.stat().st_mode & 0o777 == 0o640
        write_atomically(path, b"two")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(kept)
    assert path.read_bytes() == b"two"
    kept = os.umask(0)
    try:
        write_atomically(path, b"two")
    finally:
        os.umask(kept)
    assert path.stat().st_mode & 0o777 == 0o666
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def broken(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="no"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
