"""Failures in: rows in whatever form, checked, as prompts (or chats) with the completions they should have had."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lmrepair.errors import FailuresError, UsageError, nearest
from lmrepair.failures.forms import Form, Template, form_of, left_out
from lmrepair.failures.sources import Row, kind_of, read_rows, source_name

log = logging.getLogger("lmrepair")

Message = Mapping[str, Any]
Wording = str | tuple[Message, ...]


@dataclass(frozen=True)
class Failure:
    """A prompt with the completion the model should have given.

    Either ``prompt`` (text, as the model is to read it) or ``messages`` (a chat, rendered with the
    tokenizer's chat template, which is given ``tools`` and ``chat_template_kwargs`` as they are) is set.
    ``paraphrases`` are other prompts, or other chats, that ask for the same target.

    ``turn``: the assistant's turn that the target is, where it is more than a text (it calls tools); the
    template writes it. ``end_turn``: in a chat, the target goes on to the token that ends the turn. ``template``:
    what the prompt and the target were wrapped in.
    """

    prompt: str
    target: str
    id: str = ""
    paraphrases: tuple[Wording, ...] = ()
    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    turn: Message | None = None
    end_turn: bool = True
    template: Template | None = field(default=None, compare=False, repr=False)

    def __hash__(self) -> int:
        return hash((self.prompt, self.target, self.id))

    @property
    def asked(self) -> str:
        """The prompt, or the text of the chat's last user turn (of its last turn, where it has none)."""
        return content_text(self.messages[self._asking]) if self.messages else self.prompt

    @property
    def shown(self) -> str:
        """What the model is asked, as one text: the prompt, or the chat as JSON."""
        return json.dumps([dict(turn) for turn in self.messages], ensure_ascii=False) if self.messages else self.prompt

    @property
    def _asking(self) -> int:
        places = [at for at, turn in enumerate(self.messages) if turn.get("role") == "user"]
        return places[-1] if places else len(self.messages) - 1

    def asking(self, wording: Wording) -> Failure:
        """The same failure with another chat, or another text for its prompt (or its chat's last user turn)."""
        if not isinstance(wording, str):
            return replace(self, prompt="", messages=wording)
        if not self.messages:
            return replace(self, prompt=wording)
        before, turn, after = (
            self.messages[: self._asking],
            self.messages[self._asking],
            self.messages[self._asking + 1 :],
        )
        return replace(self, messages=(*before, {**turn, "content": wording}, *after))

    def otherwise(self) -> list[Failure]:
        """The failure in each of its other wordings; those that are its own are left out."""
        made = [replace(self.asking(wording), paraphrases=()) for wording in self.paraphrases]
        return [one for one in made if (one.prompt, one.messages) != (self.prompt, self.messages)]

    def answered(self) -> tuple[Message, ...]:
        """The chat with the wanted answer behind it."""
        return (*self.messages, self.turn or {"role": "assistant", "content": self.target})

    def wrapped(self, template: Template) -> Failure:
        """The failure with its prompt, paraphrases and target wrapped. A chat has a template of its own."""
        if self.messages:
            raise FailuresError(
                f"failure {self.id!r} has messages, which the tokenizer's chat template renders; "
                "leave --template out, or give prompts"
            )
        return replace(
            self,
            prompt=template.prompt(self.prompt),
            target=template.target(self.target),
            paraphrases=tuple(template.prompt(text) for text in self.paraphrases if isinstance(text, str)),
            template=template,
        )

    def in_chat(self) -> Failure:
        """The failure with its prompt as a user's turn; one that is a chat stays as it is."""
        turn = ({"role": "user", "content": self.prompt},)
        return self if self.messages else replace(self, prompt="", messages=turn)


def content_text(turn: Message) -> str:
    """The text of a turn: its content, or the texts of its content's parts; empty where it has none."""
    content = turn.get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def read_failures(
    path: str | Path,
    template: Template | str | None = None,
    limit: int | None = None,
    chat: bool = False,
    end_turn: bool = True,
) -> list[Failure]:
    """Read failures from a file (``-``: standard input) in any of the forms of docs/failures.md.

    ``template`` wraps raw prompts and targets; ``chat`` makes each prompt a user's turn; ``end_turn`` lets the
    targets of chats go on to the end of the turn. An id that is left out is the row's number. ``limit`` reads
    the first rows only. Raises FailuresError (with the place) for an empty file, missing, unknown or mistyped
    keys, an empty target, or an id used twice, and UsageError for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}; expected at least 1, or None for all rows")
    wrap = Template.parse(template) if isinstance(template, str) else template
    failures: list[Failure] = []
    places: dict[str, str] = {}
    seen = _Seen()
    for row in read_rows(path):
        if limit is not None and len(failures) >= limit:
            break
        form = form_of(row.values, row.where)
        seen.add(form, row)
        failure = replace(read_failure(row, form), end_turn=end_turn)
        if failure.id in places:
            raise FailuresError(
                f"{row.where}: id {failure.id!r} is already used in {places[failure.id]}; ids are unique"
            )
        places[failure.id] = row.where
        raw = form.template if form.template and not wrap and not chat and not failure.messages else wrap
        failure = failure.wrapped(raw) if raw else failure
        failures.append(failure.in_chat() if chat else failure)
    if not failures:
        raise FailuresError(f"{source_name(path)}: no failures in it; expected rows with prompt and target")
    seen.say(path)
    return failures


class _Seen:
    """Which forms the rows had and which of their keys were not read."""

    def __init__(self) -> None:
        self.forms: Counter[str] = Counter()
        self.unread: set[str] = set()

    def add(self, form: Form, row: Row) -> None:
        self.forms[form.name] += 1
        self.unread.update(left_out(form, row.values))

    def say(self, path: str | Path) -> None:
        if set(self.forms) <= {"our own"} and not self.unread:
            return
        several = len(self.forms) > 1
        names = ", ".join(f"{name} ({count})" if several else name for name, count in self.forms.items())
        unread = f"; not used: {', '.join(sorted(self.unread))}" if self.unread else ""
        log.info("%s: read as %s%s", source_name(path), names, unread)


def read_failure(row: Row, form: Form, wanted: bool = True) -> Failure:
    """One row as a failure; without ``wanted``, a row may leave its target out (the failure's is empty then)."""
    where, own = row.where, form.own(form.given(row.values), row.where)
    if ("prompt" in own) == ("messages" in own):
        found = "both prompt and messages" if "prompt" in own else "no prompt"
        raise FailuresError(f"{where}: {found}; expected one of prompt and messages")
    messages = _messages(own["messages"], where) if "messages" in own else ()
    turn = None
    if messages and "target" not in own and messages[-1]["role"] == "assistant":
        messages, turn = messages[:-1], messages[-1]
        if not messages:
            raise FailuresError(
                f"{where}: messages has an answer and nothing that is asked; expected a user turn first"
            )
    if "target" not in own and turn is None and wanted:
        ends = f", and messages ends with the role {messages[-1]['role']!r}" if messages else ""
        raise FailuresError(f"{where}: no target{ends}; expected the right completion as text")
    prompt = own.get("prompt", "")
    target = own.get("target", "") if turn is None else _answer(turn, where)
    for key, value in (("prompt", prompt), ("target", target)):
        if not isinstance(value, str):
            raise FailuresError(f"{where}: {key} is {kind_of(value)}; expected text")
    if not target and wanted:
        raise FailuresError(f"{where}: the target is empty; expected the right completion")
    if (
        messages
        and turn is None
        and messages[-1]["role"] == "assistant"
        and (not content_text(messages[-1]) or messages[-1].get("tool_calls"))
    ):
        raise FailuresError(
            f"{where}: messages ends with an assistant turn that has no text to go on from, and there is a target; "
            "leave one of them out"
        )
    identity = own.get("id", str(row.number))
    if not isinstance(identity, str | int) or isinstance(identity, bool) or identity == "":
        raise FailuresError(f"{where}: id is {kind_of(identity)}; expected text or a whole number")
    if not messages and (unread := [key for key in ("tools", "functions", "chat_template_kwargs") if own.get(key)]):
        raise FailuresError(f"{where}: {unread[0]} needs messages, for a chat template to read it; found a prompt")
    return Failure(
        prompt,
        target,
        str(identity),
        _paraphrases(own.get("paraphrases") or [], where),
        messages,
        _tools(own, where),
        _settings(own.get("chat_template_kwargs"), where),
        turn if turn is not None and turn.keys() - {"role", "content", "weight"} else None,
    )


def _answer(turn: Message, where: str) -> str:
    """The assistant's last turn as a target; calls of tools as JSON, which the template writes in its own way."""
    text = content_text(turn)
    calls = turn.get("tool_calls") or turn.get("function_call")
    if not text and not calls:
        raise FailuresError(f"{where}: the assistant turn at the end of messages is empty; expected the right answer")
    return text or json.dumps(calls, ensure_ascii=False)


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    fits = isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)
    if not fits:
        raise FailuresError(f"{where}: messages is not a list of {{role, content}} objects")
    for number, turn in enumerate(value, start=1):
        role, content = turn.get("role"), turn.get("content")
        if not isinstance(role, str):
            raise FailuresError(f"{where}: message {number} has no role; expected system, user, assistant or tool")
        if not turn.keys() & {"content", "tool_calls", "function_call"}:
            raise FailuresError(f"{where}: message {number} has no content{_near('content', turn, {'role', 'name'})}")
        if content is not None and not isinstance(content, str | list):
            raise FailuresError(
                f"{where}: content of message {number} is {kind_of(content)}; messages is not a list of "
                "{role, content} objects with texts or parts"
            )
    return tuple(dict(turn) for turn in value)


def _paraphrases(value: Any, where: str) -> tuple[Wording, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str | list) for one in value):
        raise FailuresError(f"{where}: paraphrases is {kind_of(value)}; expected a list of texts, or of messages")
    return tuple(one if isinstance(one, str) else _messages(one, f"{where}, paraphrases") for one in value)


def _tools(own: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], ...]:
    value = own.get("tools") or []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise FailuresError(f"{where}: tools is a text that is no JSON; expected a list of objects") from error
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise FailuresError(f"{where}: tools is {kind_of(value)}; expected a list of objects")
    functions = own.get("functions") or []
    if not isinstance(functions, list) or not all(isinstance(one, dict) for one in functions):
        raise FailuresError(f"{where}: functions is {kind_of(functions)}; expected a list of objects")
    return (*value, *({"type": "function", "function": one} for one in functions))


def _settings(value: Any, where: str) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise FailuresError(f"{where}: chat_template_kwargs is {kind_of(value)}; expected an object")
    return value or {}


def contradictions(failures: Iterable[Failure]) -> list[tuple[Failure, Failure]]:
    """Pairs of failures that want different targets for one and the same prompt."""
    seen: dict[str, Failure] = {}
    pairs = []
    for failure in failures:
        key = json.dumps([failure.shown, [*failure.tools], failure.chat_template_kwargs], default=str)
        first = seen.setdefault(key, failure)
        if (first.target, first.turn) != (failure.target, failure.turn):
            pairs.append((first, failure))
    return pairs


def listed(failures: Iterable[Failure]) -> list[Failure]:
    """What a repair is given, as a list. Raises UsageError for what is no failures, or none."""
    found = [] if isinstance(failures, str) else list(failures)
    other = next((type(one).__name__ for one in found if not isinstance(one, Failure)), "")
    if isinstance(failures, str) or other:
        raise UsageError(f"failures are {other or 'a text'}; expected Failure values, as read_failures(FILE) gives")
    if not found:
        raise UsageError("there are no failures to repair; expected one or more")
    return found


def _near(key: str, row: Mapping[str, Any], known: Collection[str]) -> str:
    hint = nearest(key, [name for name in row if name not in known])
    return f" ({hint.replace('did you mean', 'is it')})" if "did you mean" in hint else ""
