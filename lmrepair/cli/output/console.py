"""Lines out, on streams that may be closed, full, or know few characters."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TextIO

from lmrepair.measure import plain, visible

# What stands for the marks of our own text where a stream cannot write them; all else is spelled out.
PLAIN = str.maketrans({"→": "->", "✗": "x", "✓": "+", "…": "...", "‘": "'", "’": "'", "×": "x", "±": "+-", "≤": "<="})


def say(line: str, stream: TextIO | None = None) -> None:
    """One line on a stream (standard output), in the characters that it knows."""
    stream = stream or sys.stdout
    if not _writes(stream, line):
        line = line.translate(PLAIN)
    with unheard() if stream is sys.stderr else nullcontext():
        stream.write(line + "\n")
        stream.flush()


def say_json(data: Mapping[str, Any]) -> None:
    """A result as one JSON object on standard output; in ASCII where the stream (or a text in it) knows no UTF-8."""
    shown = plain(data)
    line = json.dumps(shown, ensure_ascii=False, allow_nan=False)
    sys.stdout.write((line if _writes(sys.stdout, line) else json.dumps(shown, allow_nan=False)) + "\n")
    sys.stdout.flush()


def show_result(data: Mapping[str, Any], lines: Sequence[str], as_json: bool) -> None:
    """A result as JSON or as lines."""
    if as_json:
        say_json(data)
        return
    for line in lines:
        say(line)


def _writes(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def open_streams() -> None:
    """Closed streams lead nowhere, so that no file gets their number; what cannot be written is spelled out."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Where writing failed nothing more is written, by Python's own flush at the end neither."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def unheard() -> Iterator[None]:
    """Where standard error takes nothing more (full, or a closed pipe), the work goes on unheard."""
    try:
        yield
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


class _Once(logging.Handler):
    """Notes on standard error; a warning once, with the first thing that it is about."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        key = str(record.msg) if record.levelno >= logging.WARNING else text
        if key not in self.said:
            self.said.add(key)
            say(f"lmrepair: {visible(text, None)}", sys.stderr)


@contextmanager
def notes() -> Iterator[None]:
    """Say on standard error what the package notes."""
    log, handler = logging.getLogger("lmrepair"), _Once()
    kept = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(kept[0])
        log.propagate = kept[1]
