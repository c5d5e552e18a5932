"""Rows in the forms that the field uses, told apart by their keys, and the wrapping of raw pairs."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lmrepair.errors import FailuresError, UsageError, nearest
from lmrepair.failures.sources import kind_of

Values = Mapping[str, Any]


def _sets(*names: str) -> tuple[frozenset[str], ...]:
    return tuple(map(_keys, names))


def _keys(names: str) -> frozenset[str]:
    return frozenset(names.split())


EXTRA = ("id", "paraphrases")
CHAT = ("tools", "functions", "chat_template_kwargs")
OURS = ("prompt", "messages", "target", *EXTRA, *CHAT)
# Notes that people keep beside a row; they say nothing to a model.
NOTES = _keys(
    "category comment comments created_at dataset date difficulty idx index label lang language level license meta "
    "metadata note notes score source source_file split subset tags task title topic type url version"
)
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


@dataclass(frozen=True)
class Template:
    """Wraps raw pairs: ``before{prompt}between`` is the prompt, ``lead{target}after`` is the target."""

    before: str = ""
    between: str = ""
    after: str = ""
    lead: str = ""

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

    def target(self, text: str) -> str:
        return f"{self.lead}{text}{self.after}"


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


@dataclass(frozen=True)
class Form:
    """A form of rows. ``one_of``: sets of keys by which it is known; ``knows``: other keys that it reads;
    ``unused``: keys that it comes with and that are not read; ``template``: how raw pairs are wrapped unless
    the user says otherwise; ``own``: makes a row of our own.
    """

    name: str
    one_of: tuple[frozenset[str], ...]
    own: Callable[[Values, str], Values]
    knows: tuple[str, ...] = ()
    unused: frozenset[str] = frozenset()
    template: Template | None = None

    def fits(self, row: Values) -> bool:
        return any(keys <= row.keys() for keys in self.one_of)

    def given(self, row: Values) -> Values:
        """The row without the nulls of keys that it may leave out, as if it did."""
        found = _present(row)
        if self.fits(found):
            return found
        needed = frozenset[str]().union(*self.one_of) - {"messages"}
        return {key: value for key, value in row.items() if key in found or key in needed}

    @property
    def keys(self) -> frozenset[str]:
        return frozenset(self.knows).union(*self.one_of)


def form_of(row: Values, where: str, also: Collection[str] = ()) -> Form:
    """The form of a row, which may have the keys ``also``.

    Raises FailuresError, with the nearest known key, for keys that belong to none.
    """
    form = next((form for keys in (_present(row), row) for form in FORMS if form.fits(keys)), OWN)
    known = form.keys | form.unused | NOTES | {*also}
    for key in row:
        if key not in known:
            missing = [name for name in ("prompt", "target") if form is OWN and name not in row]
            near = nearest(key, missing) if missing else ""
            hint = near if near.startswith("did you mean") else nearest(key, {*form.keys, *also})
            raise FailuresError(f"{where}: unknown key {key!r} ({hint}); leave it out, or put it under metadata")
    return form


def _present(row: Values) -> Values:
    return {key: value for key, value in row.items() if value is not None}


def left_out(form: Form, row: Values) -> list[str]:
    """The keys of a row that are known and not read."""
    return sorted(key for key in row if key not in form.keys)


def _text(row: Values, key: str, where: str) -> str:
    value = row.get(key, "")
    if not isinstance(value, str):
        raise FailuresError(f"{where}: {key} is {kind_of(value)}; expected text")
    return value


def _first(row: Values, *keys: str) -> str:
    return next(key for key in keys if key in row)


def _with(row: Values, **own: Any) -> Values:
    """A row of our own, with the keys that every form may have."""
    return {**_only(row, EXTRA), **own}


def _only(row: Values, keys: Collection[str]) -> dict[str, Any]:
    return {key: row[key] for key in keys if key in row}


def _alpaca(row: Values, where: str) -> Values:
    asked = _text(row, "instruction", where)
    given = _text(row, "input" if "input" in row else "context", where)
    prompt = f"{asked}\n{given}" if given else asked
    target = row[_first(row, "output", "response")]
    system, history = _text(row, "system", where), row.get("history") or []
    if not system and not history:
        return _with(row, prompt=prompt, target=target)
    pairs = isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    if not pairs:
        raise FailuresError(f"{where}: history is no list of [question, answer] pairs")
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _with(row, messages=[*messages, {"role": "user", "content": prompt}], target=target)


def _sharegpt(row: Values, where: str) -> Values:
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise FailuresError(f"{where}: conversations is {kind_of(turns)}; expected a list of {{from, value}} objects")
    system = _text(row, "system", where)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(turns, start=1)]
    return _with(row, messages=messages, **_only(row, (*CHAT, "target")))


def _turn(turn: Values, where: str) -> dict[str, Any]:
    speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(speaker, str) or speaker not in ROLES:
        hint = nearest(str(speaker), ROLES)
        raise FailuresError(f"{where}: from is {speaker!r}; {hint}")
    if not isinstance(text, str):
        raise FailuresError(f"{where}: value is {kind_of(text)}; expected text")
    if speaker != "function_call":
        return {"role": ROLES[speaker], "content": text}
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FailuresError(f"{where}: the function call is no JSON; expected name and arguments") from error
    calls = calls if isinstance(calls, list) else [calls]
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": call} for call in calls]}


def _pair(row: Values, _: str) -> Values:
    prompt, target = row["prompt"], row[_first(row, "completion", "response")]
    if not isinstance(prompt, list):
        return _with(row, prompt=prompt, target=target, **_only(row, CHAT))
    both = [*prompt, *target] if isinstance(target, list) else prompt
    answer = {} if isinstance(target, list) else {"target": target}
    return _with(row, messages=both, **_only(row, CHAT), **answer)


def _human_eval(row: Values, _: str) -> Values:
    return _with(row, prompt=row["prompt"], target=row["canonical_solution"], **_named(row, "task_id"))


def _mbpp(row: Values, where: str) -> Values:
    tests = row.get("test_list", [])
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise FailuresError(f"{where}: test_list is {kind_of(tests)}; expected a list of texts")
    prompt = "\n".join([_text(row, _first(row, "text", "prompt"), where), *tests])
    # The published file was written on Windows.
    code = _text(row, "code", where).replace("\r\n", "\n")
    return _with(row, prompt=prompt, target=code, **_named(row, "task_id"))


def _answer(row: Values, where: str) -> Values:
    given = row[_first(row, "answer", "answers")]
    given = given.get("text", []) if isinstance(given, dict) else given
    if isinstance(given, list):
        if not given:
            raise FailuresError(
                f"{where}: answers is empty; a question without an answer cannot be repaired, leave it out"
            )
        given = given[0].get("text") if isinstance(given[0], dict) else given[0]
    context = _text(row, "context", where)
    question = _text(row, "question", where)
    return _with(row, prompt=f"{question}\nContext: {context}" if context else question, target=given)


def _named(row: Values, key: str) -> dict[str, Any]:
    return {"id": row[key]} if key in row and "id" not in row else {}


def _ours(row: Values, _: str) -> Values:
    return row


OWN = Form("our own", (), _ours, OURS)
# The first that fits is the row's form.
FORMS = (
    Form("ShareGPT", _sets("conversations"), _sharegpt, (*EXTRA, *CHAT, "system", "target")),
    Form("our own", _sets("messages target", "prompt target"), _ours, OURS),
    Form("OpenAI chat", _sets("messages"), _ours, OURS, _keys("parallel_tool_calls tool_choice model")),
    Form(
        "HumanEval",
        _sets("prompt canonical_solution"),
        _human_eval,
        (*EXTRA, "task_id"),
        _keys("test entry_point base_input plus_input atol contract declaration example_test import docstring"),
    ),
    Form(
        "MBPP",
        _sets("text code", "prompt code test_list"),
        _mbpp,
        (*EXTRA, "task_id", "test_list"),
        _keys("test_setup_code challenge_test_list test_imports test"),
        Template('"""\n', '\n"""\n'),
    ),
    Form(
        "Alpaca",
        _sets("instruction output", "instruction response"),
        _alpaca,
        (*EXTRA, "input", "context", "system", "history"),
        _keys("text"),
    ),
    Form(
        "question and answer",
        _sets("question answer", "question answers"),
        _answer,
        (*EXTRA, "context"),
        _keys("is_impossible plausible_answers answer_start"),
        Template("Question: ", "\nAnswer:", lead=" "),
    ),
    Form("prompt and completion", _sets("prompt completion", "prompt response"), _pair, (*EXTRA, *CHAT)),
)
