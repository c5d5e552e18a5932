"""Reference text: what models are read on beside failures, by kind."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lmrepair.errors import FailuresError
from lmrepair.failures.files import shipped
from lmrepair.failures.forms import FORMS, Template
from lmrepair.failures.rows import Failure, read_failures
from lmrepair.failures.sources import read_lines

ROWS = (".jsonl", ".json", ".csv", ".parquet")  # how files of rows end


@dataclass(frozen=True)
class Reference:
    """Texts to measure drift on; ``name`` says which, with a digest of their content."""

    name: str
    texts: tuple[str, ...]


def read_reference(path: str | Path | None = None, kind: str = "") -> Reference:
    """Reference text from a file: JSON lines with ``text``, or plain text. Default: the set that ships.

    ``kind`` stands for the file's name in the reference's name.

    Raises FailuresError for a file that is missing, empty or not UTF-8.
    """
    source = shipped("reference.jsonl") if path is None else Path(path)
    texts = [text for _, text in _texts(source)]
    return named(kind or ("default" if path is None else source.name), texts)


def read_kinds(path: str | Path | None = None) -> list[Reference]:
    """The texts of a file apart by their ``kind`` (JSON lines; without it, the file's name is the kind)."""
    source = shipped("reference.jsonl") if path is None else Path(path)
    kinds: dict[str, list[str]] = {}
    for kind, text in _texts(source):
        kinds.setdefault(kind or source.stem, []).append(text)
    return [named(kind, texts) for kind, texts in kinds.items()]


def read_kept(
    path: str | Path, template: Template | str | None = None, chat: bool = False, end_turn: bool = True
) -> Reference | list[Failure]:
    """What is to stay as it is: reference text, or rows with the answers that they have, read as failures are.

    Rows are in files that end in .json, .csv or .parquet, or in .jsonl with more than a ``text`` in the first line.
    Raises FailuresError as ``read_reference`` and ``read_failures`` do.
    """
    source = Path(path)
    if source.suffix not in ROWS:
        return read_reference(source)
    first = [row for _, row in islice(read_lines(source), 1)] if source.suffix == ".jsonl" else []
    if any("text" in row and not any(form.fits(row) for form in FORMS) for row in first):
        return read_reference(source)
    return read_failures(source, template, chat=chat, end_turn=end_turn)


def named(kind: str, texts: Sequence[str]) -> Reference:
    """Texts as a reference: its kind with a digest of their content."""
    content = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return Reference(f"{kind}@{content}", tuple(texts))


def _texts(source: Path) -> list[tuple[str, str]]:
    """The texts of a file with their kinds, empty where none is given."""
    found = []
    if source.suffix == ".jsonl":
        for number, row in read_lines(source):
            if not isinstance(row.get("text"), str):
                raise FailuresError(f'{source}, line {number}: no text; expected reference text as {{"text": …}}')
            if not isinstance(row.get("kind", ""), str):
                raise FailuresError(f"{source}, line {number}: the kind is no text; expected a name, or none")
            found.append((row.get("kind", ""), row["text"]))
    else:
        try:
            found = [("", source.read_text(encoding="utf-8"))]
        except (OSError, UnicodeDecodeError) as error:
            raise FailuresError(f"{source}: cannot be read as UTF-8 text ({error})") from error
    if not any(text.strip() for _, text in found):
        raise FailuresError(f"{source}: no reference text in it")
    return found
