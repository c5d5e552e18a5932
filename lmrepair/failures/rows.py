"""Failures in: rows of JSON lines, and the templates that wrap raw pairs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lmrepair.errors import FailuresError, UsageError, nearest
from lmrepair.failures.files import kind_of, read_lines

KEYS = ("prompt", "messages", "target", "id", "paraphrases")


@dataclass(frozen=True)
class Failure:
    """A prompt with the completion the model should have given.

    Either ``prompt`` (text, as the model is to read it) or ``messages`` (a chat, rendered with the
    tokenizer's chat template) is set. ``paraphrases`` are other prompts that ask for the same target.
    """

    prompt: str
    target: str
    id: str = ""
    paraphrases: tuple[str, ...] = ()
    messages: tuple[Mapping[str, str], ...] = ()

    @property
    def asked(self) -> str:
        """The prompt, or the last message of the chat."""
        return self.messages[-1]["content"] if self.messages else self.prompt

    def asking(self, text: str) -> Failure:
        """The same failure with another text for its prompt, or for the last message of its chat."""
        if not self.messages:
            return replace(self, prompt=text)
        return replace(self, messages=(*self.messages[:-1], {**self.messages[-1], "content": text}))


@dataclass(frozen=True)
class Template:
    """Wraps raw pairs: ``before{prompt}between`` is the prompt, ``{target}after`` is the target."""

    before: str = ""
    between: str = ""
    after: str = ""

    @classmethod
    def parse(cls, text: str) -> Template:
        r"""Read ``'# {prompt}\n{target}\n'``; ``\n``, ``\t`` and ``\\`` are understood as escapes.

        Raises UsageError where the two fields are not there once each, prompt first.
        """
        for field in ("{prompt}", "{target}"):
            if text.count(field) != 1:
                raise UsageError(
                    f"template {text!r} has {field} {text.count(field)} times; expected once, "
                    r"as in '# {prompt}\n{target}\n'"
                )
        head, after = text.split("{target}")
        if "{prompt}" not in head:
            raise UsageError(f"template {text!r} has {{target}} before {{prompt}}; the target comes last")
        before, between = head.split("{prompt}")
        return cls(_unescape(before), _unescape(between), _unescape(after))

    def prompt(self, text: str) -> str:
        return f"{self.before}{text}{self.between}"

    def wrap(self, failure: Failure) -> Failure:
        """The failure with its prompt, paraphrases and target wrapped. A chat has a template of its own."""
        if failure.messages:
            raise FailuresError(
                f"failure {failure.id!r} has messages, which the tokenizer's chat template renders; "
                "leave --template out, or give prompts"
            )
        return replace(
            failure,
            prompt=self.prompt(failure.prompt),
            target=failure.target + self.after,
            paraphrases=tuple(self.prompt(text) for text in failure.paraphrases),
        )


def _unescape(text: str) -> str:
    escapes = {"n": "\n", "t": "\t", "\\": "\\"}
    out, characters = [], iter(text)
    for character in characters:
        if character != "\\":
            out.append(character)
            continue
        following = next(characters, "")
        out.append(escapes.get(following, "\\" + following))
    return "".join(out)


def read_failures(path: str | Path, template: Template | str | None = None, limit: int | None = None) -> list[Failure]:
    """Read failures from JSON lines: ``prompt`` or ``messages``, ``target``, and optional ``id``, ``paraphrases``.

    An id that is left out is the line number. ``limit`` reads the first rows only. Raises FailuresError
    (with the line) for an empty file, missing or mistyped keys, an empty target, or an id used twice.
    """
    wrap = Template.parse(template) if isinstance(template, str) else template
    failures: list[Failure] = []
    lines: dict[str, int] = {}
    for number, row in read_lines(path):
        if limit is not None and len(failures) >= limit:
            break
        failure = read_failure(row, number, f"{path}, line {number}")
        if failure.id in lines:
            raise FailuresError(
                f"{path}, line {number}: id {failure.id!r} is already used on line {lines[failure.id]}; ids are unique"
            )
        lines[failure.id] = number
        failures.append(wrap.wrap(failure) if wrap else failure)
    if not failures:
        raise FailuresError(f"{path}: no failures in it; expected JSON lines with prompt and target")
    return failures


def read_failure(row: Mapping[str, Any], number: int, where: str) -> Failure:
    """One row of JSON lines as a failure; ``where`` is named in the FailuresError that says what is wrong with it."""
    if ("prompt" in row) == ("messages" in row):
        found = "both prompt and messages" if "prompt" in row else _unknown(row)
        raise FailuresError(f"{where}: {found}; expected one of prompt and messages")
    if "target" not in row:
        raise FailuresError(f"{where}: no target{_near('target', row)}; expected the right completion as text")
    prompt, target = row.get("prompt", ""), row["target"]
    for key, value in (("prompt", prompt), ("target", target)):
        if not isinstance(value, str):
            raise FailuresError(f"{where}: {key} is {kind_of(value)}; expected text")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise FailuresError(f"{where}: {key} has half of a surrogate pair; expected well-formed Unicode")
    if not target:
        raise FailuresError(f"{where}: the target is empty; expected the right completion")
    identity = row.get("id", str(number))
    if not isinstance(identity, str | int) or isinstance(identity, bool) or identity == "":
        raise FailuresError(f"{where}: id is {kind_of(identity)}; expected text or a whole number")
    paraphrases = row.get("paraphrases", [])
    if not isinstance(paraphrases, list) or not all(isinstance(text, str) for text in paraphrases):
        raise FailuresError(f"{where}: paraphrases is {kind_of(paraphrases)}; expected a list of texts")
    return Failure(prompt, target, str(identity), tuple(paraphrases), _messages(row.get("messages"), where))


def _messages(value: Any, where: str) -> tuple[Mapping[str, str], ...]:
    if value is None:
        return ()
    fits = (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)
            for item in value
        )
    )
    if not fits:
        raise FailuresError(f"{where}: messages is not a list of {{role, content}} objects with texts")
    return tuple({"role": item["role"], "content": item["content"]} for item in value)


def contradictions(failures: Iterable[Failure]) -> list[tuple[Failure, Failure]]:
    """Pairs of failures that want different targets for one and the same prompt."""
    seen: dict[str, Failure] = {}
    pairs = []
    for failure in failures:
        key = failure.prompt if not failure.messages else json.dumps([dict(m) for m in failure.messages])
        first = seen.setdefault(key, failure)
        if first.target != failure.target:
            pairs.append((first, failure))
    return pairs


def _near(key: str, row: Mapping[str, Any]) -> str:
    hint = nearest(key, [name for name in row if name not in KEYS])
    return f" ({hint.replace('did you mean', 'is it').rstrip('?')}?)" if "did you mean" in hint else ""


def _unknown(row: Mapping[str, Any]) -> str:
    return f"no prompt{_near('prompt', row)}"
