"""The gate as a value: what a patch must not do if it is to be kept. ``guard.py`` holds patches against it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lmrepair.errors import FailuresError, UsageError
from lmrepair.failures import Failure, Template, kind_of, read_failure, read_lines

if TYPE_CHECKING:
    from lmrepair.drift import Reference
    from lmrepair.patch import Patch

MAX_KL = 0.1  # nats per token on the worst kind of reference text; docs/gate.md has the figures behind it
ANSWER = 24  # tokens of a protected answer that neither a target nor a length is given for
SOLVES = 8


@dataclass(frozen=True)
class Protected:
    """A prompt whose greedy answer must stay.

    With a target in ``failure``, greedy text must still give that, if it gave it before; with an empty one,
    it must still begin with the first ``length`` tokens that the untouched model answers.
    """

    failure: Failure
    length: int = ANSWER


@dataclass(frozen=True)
class Gate:
    """What a patch must not do if it is to be kept.

    ``max_kl``: KL(before ‖ after) on reference text, nats per token; the worst of ``references`` counts
    (none: the repair's own reference text, by kind where it is the one that ships); infinity: not measured.
    ``protect``: prompts that must come out as before. ``memory``: earlier patches; those of their repairs
    that hold now must hold afterwards. ``solves``: at most so many solves for one patch, where it has to be
    made again without some of the failures.
    """

    max_kl: float = MAX_KL
    references: tuple[Reference, ...] = ()
    protect: tuple[Protected, ...] = ()
    memory: tuple[Patch, ...] = ()
    solves: int = SOLVES

    def __post_init__(self) -> None:
        if not self.max_kl > 0:
            raise UsageError(f"max_kl is {self.max_kl}; expected nats per token above 0, or inf for no limit")
        if self.solves < 1:
            raise UsageError(f"solves is {self.solves}; expected at least 1")


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
