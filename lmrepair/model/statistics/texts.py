"""The texts that are read for statistics and for drift."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lmrepair.errors import FailuresError
from lmrepair.failures import Failure, Tokens, prompt_ids
from lmrepair.model.net import Net

WINDOW = 256  # tokens read of one reference text
ROOM = 4608  # tokens read of rows that are given: twice as many as a dense model writes by itself
ASKED = 1024  # the same of rows without answers
BEGUN = 8  # tokens at most that are given of a text's beginning
BEGINNINGS = (
    "import os\n\n\ndef ",
    "# Read a file and print its lines\n",
    "class Node:\n    def ",
    "#!/bin/bash\n\n# Remove old files\n",
    "SELECT name FROM people WHERE ",
    "function main(args) {\n  ",
    "<html>\n<head>\n  <title>",
    "package main\n\nimport ",
    "; move the value into eax\nmov eax, ",
    "#include <stdio.h>\n\nint main(",
    "name: build\non:\n  push:\n",
    "# How to install\n\n1. ",
)


def beginnings(net: Net, length: int) -> list[tuple[int, ...]]:
    """First tokens of texts of several kinds, all as many, at most half of ``length``; none where that is too few.

    From nothing, a model writes mostly prose: what it has to say of code would not be known.
    """
    rows = [tuple(net.tokenizer(text, verbose=False)["input_ids"]) for text in BEGINNINGS]
    width = min(BEGUN, length // 2, *(len(row) for row in rows))
    known = len(net.model.get_input_embeddings().weight)
    return [row[:width] for row in rows if max(row[:width]) < known] if width > 1 else []


def windows(net: Net, texts: Sequence[str]) -> list[Tokens]:
    """The first WINDOW tokens of each text, every token after the first to be predicted."""
    length = min(WINDOW, net.anatomy.context or WINDOW)
    found = []
    for index, text in enumerate(texts):
        ids = net.tokenizer(text, verbose=False)["input_ids"][:length]
        if len(ids) > 1:
            found.append(Tokens(str(index), tuple(ids[:1]), tuple(ids[1:])))
    if not found:
        raise FailuresError("the reference text is too short: expected texts of two tokens or more")
    return found


def answered(net: Net, rows: Sequence[Failure]) -> list[Tokens]:
    """Rows with their answers as ``windows`` reads texts, or, without a target, as far as what they ask.

    The first of them whose tokens come to ROOM, or to ASKED where none has an answer.
    """
    length, left = min(WINDOW, net.anatomy.context or WINDOW), ROOM if any(row.target for row in rows) else ASKED
    found = []
    for row in rows:
        if left <= 0:
            break
        ids = net.tokenize([row])[0].ids[:length] if row.target else _asked(net, row)
        if len(ids) > 1:
            found.append(Tokens(row.id, ids[:1], ids[1:]))
            left -= len(ids) - 1
    return found


def _asked(net: Net, row: Failure) -> tuple[int, ...]:
    """A prompt whole, and any token behind it: a position is read where a token follows.

    Nothing for a chat that the template refuses, or a prompt that fills the context.
    """
    try:
        ids = prompt_ids(row, net.tokenizer)
    except FailuresError:
        return ()
    fits = len(ids) < (net.anatomy.context or math.inf) and max(ids) < net.anatomy.vocabulary
    return (*ids, ids[0]) if fits else ()
