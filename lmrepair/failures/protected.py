"""What a repair must leave as it is: prompts with their answers, and how much other text may change."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lmrepair.errors import FailuresError
from lmrepair.failures.forms import Template, form_of
from lmrepair.failures.rows import Failure, read_failure
from lmrepair.failures.sources import Row, kind_of, read_rows, source_name

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


def read_protected(
    path: str | Path, template: Template | str | None = None, length: int = ANSWER, end_turn: bool = True
) -> list[Protected]:
    """Read rows as ``read_failures`` does, whose target may be missing; ``length`` (in tokens) may stand for it.

    ``length`` is for rows that have neither a target nor a length. Raises FailuresError, with the place, for
    rows that are no such thing, and for a file without any.
    """
    wrap = Template.parse(template) if isinstance(template, str) else template
    found = []
    for row in map(_known, read_rows(path)):
        given = row.values.get("length", length)
        if type(given) is not int or given < 1:
            shown = given if type(given) is int else kind_of(given)
            raise FailuresError(
                f"{row.where}: length is {shown}; expected how many tokens of the answer must stay, 1 or more"
            )
        if row.values.get("target") == "":
            raise FailuresError(f"{row.where}: the target is empty; expected what must come out, or no target at all")
        form = form_of(row.values, row.where, ("length",))
        failure = replace(read_failure(row, form, wanted=False), end_turn=end_turn)
        if "length" in row.values and failure.target:
            raise FailuresError(
                f"{row.where}: both target and length; the target says how much must stay, leave length out"
            )
        raw = wrap or (form.template if not failure.messages else None)
        wrapped = failure.wrapped(raw) if raw else failure
        found.append(Protected(wrapped if failure.target else replace(wrapped, target=""), given))
    if not found:
        raise FailuresError(
            f"{source_name(path)}: no prompts in it; expected rows with prompt, and target where it is known"
        )
    return found


def _known(row: Row) -> Row:
    """The row without a target or a length that is null: here both may be left out."""
    unknown = {key for key in ("target", "length") if row.values.get(key) is None}
    return replace(row, values={key: value for key, value in row.values.items() if key not in unknown})
