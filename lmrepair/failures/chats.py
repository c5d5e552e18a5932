"""Chats as the model reads them: rendered with the tokenizer's template, up to where the answer starts, and to its end.

Everything about a template is found out by rendering. transformers renders in a sandbox.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lmrepair.errors import FailuresError
from lmrepair.failures.rows import Failure, Message, content_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("lmrepair")

STAND_IN = "Answer"  # stands for an answer, to see what a template writes around one


@dataclass(frozen=True)
class Rendered:
    """A chat as text: what the model reads, and what it should go on with (with the end of the turn)."""

    prompt: str
    target: str


@dataclass(frozen=True)
class _Around:
    """What a template writes before and behind an answer; ``end`` is the part of ``behind`` that ends the turn."""

    before: str
    behind: str
    end: str


def rendered(failure: Failure, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """The failure's chat, which the answer follows, and the answer as the template writes it.

    The answer starts where the template's assistant prefix ends: behind its generation prompt, or, in a
    template without one, where it puts an assistant turn's text. A chat that ends with an assistant turn is
    continued. Raises FailuresError, with the template's own words, for whatever the template raises, for
    content that it writes as Python objects, and for an answer that it does not write behind the prompt.
    """
    if not getattr(tokenizer, "chat_template", None) and "chat_template" not in failure.chat_template_kwargs:
        raise FailuresError(
            f"failure {failure.id!r} is asked as a chat, but the tokenizer has no chat template; "
            "give a prompt, without --chat"
        )
    _refuse_settings(failure, tokenizer)
    goes_on = failure.messages[-1]["role"] == "assistant"
    around = _around(failure, tokenizer, goes_on)
    if goes_on:
        prompt, lead = _render(failure, tokenizer, failure.messages, continue_final_message=True), ""
    else:
        prompt, lead = _asked(failure, tokenizer, around)
    _refuse_objects(failure, prompt)
    _say_unread(failure, tokenizer, goes_on)
    end = around.end if around is not None and failure.end_turn else ""
    if failure.turn is not None:
        return Rendered(prompt, _written(failure, tokenizer, prompt, around) + end)
    target = failure.target
    if target[:1].isspace():
        lead = ""
    return Rendered(prompt, lead + target + ("" if end and target.endswith(end.strip()) else end))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The token that the chat template ends an assistant's turn with; empty where it writes none, None without one.

    Raises FailuresError for a template that refuses a user's plain turn.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    asked = Failure("", STAND_IN, messages=({"role": "user", "content": "Question"},))
    _render(asked, tokenizer, asked.messages)
    around = _around(asked, tokenizer, False)
    return around.end.strip() if around is not None else ""


def _asked(failure: Failure, tokenizer: PreTrainedTokenizerBase, around: _Around | None) -> tuple[str, str]:
    """The prompt, and what stands between it and an answer."""
    prompt = _render(failure, tokenizer, failure.messages, add_generation_prompt=True)
    if around is None or not around.before.startswith(prompt):
        return prompt, ""
    between = around.before[len(prompt) :]
    plain = _render(failure, tokenizer, failure.messages)
    if prompt == plain:  # the template has no generation prompt of its own
        prompt += between.rstrip(" ")
        between = around.before[len(prompt) :]
    return prompt, between if between.isspace() else ""


def _around(failure: Failure, tokenizer: PreTrainedTokenizerBase, goes_on: bool) -> _Around | None:
    """What the template writes around an answer; None where it shows none, or refuses one there."""
    stand_in = STAND_IN
    while stand_in in failure.shown:
        stand_in += "s"
    turns: Sequence[Message] = (*failure.messages, {"role": "assistant", "content": stand_in})
    if goes_on:
        last = failure.messages[-1]
        turns = (*failure.messages[:-1], {**last, "content": content_text(last) + stand_in})
    try:
        text = _render(failure, tokenizer, turns)
    except FailuresError:
        return None
    before, found, behind = text.rpartition(stand_in)
    return _Around(before, behind, _end(behind, tokenizer)) if found else None


def _end(behind: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The start of ``behind`` up to and with its first token, where that is one of the tokenizer's own."""
    blank = len(behind) - len(behind.lstrip())
    own = {str(token.content) for token in tokenizer.added_tokens_decoder.values()} | {*tokenizer.all_special_tokens}
    fitting = [token for token in own if token.strip() and behind.startswith(token, blank)]
    return behind[:blank] + max(fitting, key=len) if fitting else ""


def _written(failure: Failure, tokenizer: PreTrainedTokenizerBase, prompt: str, around: _Around | None) -> str:
    """An answer that is more than a text, as the template writes it behind the prompt."""
    whole = _render(failure, tokenizer, failure.answered())
    start = prompt if whole.startswith(prompt) else around.before if around is not None else ""
    behind = around.behind if around is not None else ""
    if not start or not whole.startswith(start) or not whole.endswith(behind) or len(whole) <= len(start) + len(behind):
        raise FailuresError(
            f"failure {failure.id!r}: the chat template does not write the assistant's last turn behind its prompt; "
            "give what the model should write as target"
        )
    return whole[len(start) : len(whole) - len(behind)]


def _render(failure: Failure, tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], **mode: Any) -> str:
    import jinja2

    settings: dict[str, Any] = {**failure.chat_template_kwargs, **mode}
    if failure.tools:
        settings["tools"] = [dict(tool) for tool in failure.tools]
    try:
        return str(tokenizer.apply_chat_template([dict(turn) for turn in turns], tokenize=False, **settings))
    except (jinja2.TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError) as error:
        raise _refusal(failure, tokenizer, error) from error
    except (ImportError, NameError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise _refusal(failure, tokenizer, error) from error


def _refusal(failure: Failure, tokenizer: PreTrainedTokenizerBase, error: Exception) -> FailuresError:
    import jinja2

    named = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named and "chat_template" not in failure.chat_template_kwargs:
        return FailuresError(
            f"failure {failure.id!r}: the tokenizer has several chat templates and no default "
            f'({", ".join(sorted(named))}); name one: "chat_template_kwargs": {{"chat_template": NAME}}'
        )
    words = " ".join(str(error).split())[:300]
    if not isinstance(error, jinja2.TemplateError) or not words:
        words = f"{type(error).__name__}: {words}"
    return FailuresError(f"failure {failure.id!r}: the chat template refuses it: {words}")


def _refuse_settings(failure: Failure, tokenizer: PreTrainedTokenizerBase) -> None:
    """Settings that are not the template's but of the call that renders it."""
    call = inspect.signature(tokenizer.apply_chat_template).parameters.values()
    taken = {one.name for one in call if one.kind is not one.VAR_KEYWORD} | {"messages", "conversations"}
    for name in failure.chat_template_kwargs:
        if name in taken - {"documents", "chat_template"}:
            advice = "put tools beside messages" if name == "tools" else "leave it out"
            raise FailuresError(
                f"failure {failure.id!r}: chat_template_kwargs has {name!r}, which is set here; {advice}"
            )


def _refuse_objects(failure: Failure, prompt: str) -> None:
    for turn in failure.messages:
        content = turn.get("content")
        if isinstance(content, list) and content and str(content) in prompt:
            raise FailuresError(
                f"failure {failure.id!r}: the chat template writes content parts as Python objects; "
                "give the content as one text"
            )


def _say_unread(failure: Failure, tokenizer: PreTrainedTokenizerBase, goes_on: bool) -> None:
    """Say what of a chat makes no difference to what the model reads."""
    kinds: dict[str, Failure] = {}
    if failure.tools:
        kinds["tools"] = replace(failure, tools=())
    for name in failure.chat_template_kwargs:
        others = {key: value for key, value in failure.chat_template_kwargs.items() if key != name}
        kinds[name] = replace(failure, chat_template_kwargs=others)
    if any(turn.get("tool_calls") for turn in failure.messages):
        kinds["tool_calls"] = replace(failure, messages=tuple(_without_calls(turn) for turn in failure.messages))
    if not kinds:
        return
    mode: Mapping[str, bool] = {"continue_final_message": True} if goes_on else {"add_generation_prompt": True}
    prompt = _render(failure, tokenizer, failure.messages, **mode)
    for name, without in kinds.items():
        try:
            same = _render(without, tokenizer, without.messages, **mode) == prompt
        except FailuresError:
            continue
        if same:
            log.warning("failure %r: the chat template does not read %s; the model is asked without", failure.id, name)


def _without_calls(turn: Message) -> Message:
    return {key: value for key, value in turn.items() if key != "tool_calls"}
