"""Files in and out: JSON lines read strictly, files that ship, files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from lmrepair.errors import FailuresError


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, and flush it and its folder to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            mask = os.umask(0)
            os.umask(mask)
            os.fchmod(file.fileno(), 0o666 & ~mask)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def shipped(name: str) -> Path:
    """A file or folder that ships in the package, by its name there."""
    return Path(str(files("lmrepair") / "model" / "embedded")) / name


def read_lines(path: str | Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """The JSON objects of a JSON-lines file with their line numbers; blank lines are passed over.

    Raises FailuresError for a file that is missing, not UTF-8, or has a line that is not an object.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise FailuresError(f"{path}: no such file; expected JSON lines with prompt and target") from error
    except OSError as error:
        raise FailuresError(f"{path}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        where = f"{path}, line {number}"
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise FailuresError(f"{where}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error
        if not text:
            continue
        try:
            row = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deeply")
            raise FailuresError(f"{where}: broken JSON ({reason}); expected one object a line") from error
        if not isinstance(row, dict):
            raise FailuresError(f"{where}: found {kind_of(row)}; expected an object with prompt and target")
        yield number, row


def kind_of(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
