"""What a repair must leave as it is: prompts with their answers, and how much other text may change."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lmrepair.errors import FailuresError
from lmrepair.failures.files import kind_of, read_lines
from lmrepair.failures.rows import Failure, Template, read_failure

MAX_KL = 0.1  # nats per token on the worst kind of reference text; docs/gate.md has the figures behind it

ANSWER = 24  # tokens of a protected answer that neither a target nor a length is given for


@dataclass(frozen=True)
class Protected:
    """A prompt whose greedy answer must stay.

    With a target in ``failure``, greedy text must still give that, if it gave it before; with an empty one,
    it must still begin with the first ``length`` tokens that the untouched model answers.
    """

    failure: Failure
    length: int = ANSWER


def read_protected(path: str | Path, template: Template | str | None = None, length: int = ANSWER) -> list[Protected]:
    """Read JSON lines: ``prompt`` or ``messages``, and optional ``target``, ``length`` (in tokens), ``id``.

    ``length`` is for rows that have neither a target nor a length. Raises FailuresError, with the line, for
    rows that are no such thing, and for a file without any.
    """
    wrap = Template.parse(template) if isinstance(template, str) else template
    found = []
    for number, row in read_lines(path):
        where = f"{path}, line {number}"
        given = row.get("length", length)
        if type(given) is not int or given < 1:
            shown = given if type(given) is int else kind_of(given)
            raise FailuresError(
                f"{where}: length is {shown}; expected how many tokens of the answer must stay, 1 or more"
            )
        if "length" in row and "target" in row:
            raise FailuresError(
                f"{where}: both target and length; the target says how much must stay, leave length out"
            )
        failure = read_failure({"target": "?", **row}, number, where)
        failure = wrap.wrap(failure) if wrap else failure
        found.append(Protected(failure if "target" in row else replace(failure, target=""), given))
    if not found:
        raise FailuresError(f"{path}: no prompts in it; expected JSON lines with prompt, and target where it is known")
    return found
