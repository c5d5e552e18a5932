"""Files of rows: JSON lines, a JSON array, CSV or Parquet, told apart by what is in them; ``-`` is standard input."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmrepair.errors import FailuresError

STANDARD_INPUT = "-"
DEEPEST = 100  # levels of lists and objects in a row
BOM = b"\xef\xbb\xbf"
PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "a zip archive",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
WIDE = {b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
# Columns of CSV files by which a header is known, and those whose cells hold JSON.
HEADERS = frozenset({"prompt", "target", "messages", "conversations", "instruction", "question", "completion", "text"})
JSON_COLUMNS = frozenset(
    {"messages", "conversations", "paraphrases", "tools", "functions", "chat_template_kwargs", "history"}
    | {"test_list", "answers"}
)
OPTIONAL_COLUMNS = JSON_COLUMNS | {"id", "system", "input", "context"}
ONE_A_LINE = "one object a line"
A_LIST = "a list of objects, [{…}, {…}]"


@dataclass(frozen=True)
class Row:
    """One row: its keys and values, its number from 1, the place that errors name, and the line where it begins
    in a file of JSON objects.
    """

    number: int
    where: str
    values: Mapping[str, Any]
    line: int | None = None


@dataclass(frozen=True)
class _Header:
    """The column names of a CSV file, what stands between cells, and whether spaces follow that."""

    names: list[str]
    between: str
    spaced: bool


def source_name(path: str | Path) -> str:
    """What messages call a file: its path, or standard input."""
    return "standard input" if str(path) == STANDARD_INPUT else str(path)


def read_bytes(path: str | Path) -> bytes:
    """A file whole; standard input where it is called ``-``. Raises FailuresError for what cannot be read."""
    name = source_name(path)
    try:
        if str(path) != STANDARD_INPUT:
            return Path(path).read_bytes()
        if sys.stdin is None or sys.stdin.closed:
            raise FailuresError("standard input is closed; expected rows on it, because - was named")
        return bytes(sys.stdin.buffer.read())
    except FileNotFoundError as error:
        raise FailuresError(f"{name}: no such file; expected rows with prompt and target") from error
    except OSError as error:
        raise FailuresError(f"{name}: cannot be read ({error.strerror or error})") from error


def read_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a file, one after another; blank lines are passed over.

    Raises FailuresError, with the place, for a file that is missing, packed, not UTF-8, or has a row that is
    no object, holds a key twice, half of a surrogate pair, or more than 100 levels.
    """
    name = source_name(path)
    raw = read_bytes(path)
    if raw.startswith(b"PAR1"):
        yield from _parquet(raw, name)
        return
    _refuse_other_bytes(raw, name)
    raw = raw.removeprefix(BOM)
    start = raw.lstrip()[:1]
    if start == b"[":
        rows = _array(_decoded(raw, name), name)
    elif start != b"{" and (header := _header(raw, name)):
        rows = _csv(_decoded(raw, name), name, header)
    else:
        rows = _json_lines(raw, name)
    for row in rows:
        _refuse_unsound(row)
        yield row


def read_lines(path: str | Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """The rows of a file as ``read_rows`` gives them, each with its line; with its number where no line is known."""
    return ((row.number if row.line is None else row.line, dict(row.values)) for row in read_rows(path))


def _refuse_other_bytes(raw: bytes, name: str) -> None:
    shown = "FILE" if name == "standard input" else name
    wide = next((kind for mark, kind in WIDE.items() if raw.startswith(mark)), None)
    if wide is None and raw[:64].count(0) * 3 > len(raw[:64]):
        wide = "UTF-16BE" if raw[:1] == b"\0" else "UTF-16LE"
    if wide is not None:
        raise FailuresError(f"{name}: {wide}; expected UTF-8: iconv -f {wide} -t UTF-8 {shown} > new.jsonl")
    packed = next((kind for mark, kind in PACKED.items() if raw.startswith(mark)), None)
    if packed is not None:
        raise FailuresError(f"{name}: packed ({packed}); unpack it first, or pipe what is in it to -")


def _decoded(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise FailuresError(f"{name}, line {line}: not UTF-8; save the file as UTF-8") from error


def _json_lines(raw: bytes, name: str) -> Iterator[Row]:
    number = 0
    for at, line in enumerate(raw.split(b"\n"), start=1):
        where = f"{name}, line {at}"
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise FailuresError(f"{where}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error
        if not text:
            continue
        try:
            value = _parsed(text, where)
        except FailuresError:
            if number or not text.startswith("{") or text.endswith("}"):
                raise
            yield from _objects(_decoded(raw, name), name)  # objects that are spread over several lines
            return
        number += 1
        yield _row(value, number, where, at)


def _objects(text: str, name: str) -> Iterator[Row]:
    """JSON objects one behind another, however they are broken into lines."""
    decoder = json.JSONDecoder(object_pairs_hook=_once)
    number, line, at, end = 0, 1, 0, len(text.rstrip())
    while at < end:
        start = at
        while text[at].isspace():
            at += 1
        number, line = number + 1, line + text.count("\n", start, at)
        where = f"{name}, line {line}"
        with _Parsing(where):
            value, after = decoder.raw_decode(text, at)
        yield _row(value, number, where, line)
        at, line = after, line + text.count("\n", at, after)


def _array(text: str, name: str) -> Iterator[Row]:
    for number, value in enumerate(_parsed(text, name, A_LIST), start=1):
        yield _row(value, number, f"{name}, item {number}")


def _row(value: Any, number: int, where: str, line: int | None = None) -> Row:
    if not isinstance(value, dict):
        raise FailuresError(f"{where}: found {kind_of(value)}; expected an object with prompt and target")
    return Row(number, where, value, line)


class _Parsing:
    """Turn what the JSON parser raises into one line with the place; in a list, which is parsed as a whole, that is
    the parser's own.
    """

    def __init__(self, where: str, expected: str = ONE_A_LINE) -> None:
        self.where = where
        self.expected = expected

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RecursionError):
            raise self._refusal("nested too deeply") from error
        if isinstance(error, ValueError):
            reason = getattr(error, "msg", str(error))
            reason = (
                f"a number of more than {sys.get_int_max_str_digits()} digits" if "int_max_str" in reason else reason
            )
            if isinstance(error, json.JSONDecodeError) and self.expected == A_LIST:
                self.where += f", line {error.lineno}, column {error.colno}"
            raise self._refusal(reason) from error

    def _refusal(self, reason: str) -> FailuresError:
        return FailuresError(f"{self.where}: broken JSON ({reason}); expected {self.expected}")


def _parsed(text: str, where: str, expected: str = ONE_A_LINE) -> Any:
    with _Parsing(where, expected):
        return json.loads(text, object_pairs_hook=_once)


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} twice in one object")
    return found


def _header(raw: bytes, name: str) -> _Header | None:
    """The header of a CSV file, in small letters; None where the first line is no such thing.

    Raises FailuresError where it is none and the file looks like a CSV all the same.
    """
    first = _decoded(raw.lstrip().split(b"\n", 1)[0], name)
    for between in (",", "\t", ";"):
        try:
            cells = next(csv.reader([first], delimiter=between, skipinitialspace=True, strict=True), [])
        except csv.Error:
            continue
        names = [cell.strip().lower() for cell in cells]
        if len(names) > 1 and HEADERS & {*names}:
            return _Header(names, between, f"{between} " in first)
    if first and _like_csv(first, name):
        raise FailuresError(
            f"{name}: the first line, {first[:60].rstrip()!r}, is no header of a CSV; expected names of columns such "
            "as prompt,target, with commas, tabs or semicolons between them, and LF or CRLF at the ends of lines"
        )
    return None


def _like_csv(first: str, name: str) -> bool:
    words = [word.strip(' "').lower() for word in re.split(r"[,;\t|\r]", first.strip())]
    header = len(words) > 1 and not HEADERS.isdisjoint(words)
    return header or first.startswith("sep=") or name.lower().endswith((".csv", ".tsv"))


def _csv(text: str, name: str, header: _Header) -> Iterator[Row]:
    names = header.names
    twice = [column for column in names if names.count(column) > 1]
    if twice:
        raise FailuresError(f"{name}, line 1: two columns are called {twice[0]!r}; expected each name once")
    lines = io.StringIO(text.lstrip(), newline="")
    rows = csv.reader(lines, delimiter=header.between, skipinitialspace=header.spaced, strict=True)
    try:
        next(rows)
        number = 0
        for cells in rows:
            if not cells:
                continue
            number += 1
            where = f"{name}, line {rows.line_num}"
            if len(cells) != len(names):
                raise FailuresError(f"{where}: {len(cells)} cells for {len(names)} columns; quote cells with commas")
            values = {column: _cell(column, cell, where) for column, cell in zip(names, cells, strict=True)}
            kept = {column: value for column, value in values.items() if value or column not in OPTIONAL_COLUMNS}
            yield Row(number, where, kept)
    except csv.Error as error:
        raise FailuresError(
            f'{name}, line {rows.line_num}: broken CSV ({error}); expected cells quoted with "'
        ) from error


def _cell(column: str, cell: str, where: str) -> Any:
    if column in JSON_COLUMNS and cell[:1] in ("[", "{"):
        return _parsed(cell, f"{where}, {column}", "a list or an object")
    return cell


def _parquet(raw: bytes, name: str) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise FailuresError(f"{name}: Parquet needs the extra parquet: pip install 'lmrepair[parquet]'") from error
    try:
        rows = parquet.read_table(pyarrow.BufferReader(raw)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise FailuresError(f"{name}: damaged Parquet ({' '.join(str(error).split())[:200]})") from error
    for number, values in enumerate(rows, start=1):
        yield Row(number, f"{name}, row {number}", _without_nulls(values))


def _without_nulls(value: Any) -> Any:
    """Columns are there in every row: what a row does not have is null, at every level."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _refuse_unsound(row: Row) -> None:
    """Half of a surrogate pair anywhere in a row, or levels that whatever reads it next would fail on."""
    for key, value in row.values.items():
        level: list[Any] = [key, value]
        for _ in range(DEEPEST + 1):
            if any(isinstance(item, str) and is_torn(item) for item in level):
                shown = key.encode("ascii", "backslashreplace").decode()
                raise FailuresError(f"{row.where}: {shown} has half of a surrogate pair; expected well-formed Unicode")
            inner: list[Any] = []
            for item in level:
                inner += (
                    [*item.keys(), *item.values()] if isinstance(item, dict) else item if isinstance(item, list) else ()
                )
            level = inner
            if not level:
                break
        else:
            raise FailuresError(f"{row.where}: {key} is nested more than {DEEPEST} deep; expected less")


def kind_of(value: Any) -> str:
    """What a value of JSON is called."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def is_torn(text: str) -> bool:
    """Whether a text holds half of a surrogate pair."""
    return any("\ud800" <= character <= "\udfff" for character in text)
