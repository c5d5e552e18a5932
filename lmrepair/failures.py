"""Failures in: JSON lines, templates, and token ids joined at the true prompt/target boundary."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmrepair.errors import FailuresError, UsageError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
class Tokens:
    """A failure as the model reads it: the ids of the prompt, then the ids of the target."""

    id: str
    prompt: tuple[int, ...]
    target: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        return self.prompt + self.target


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


def read_lines(path: str | Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """The JSON objects of a JSON-lines file with their line numbers; blank lines are passed over.

    Raises FailuresError for a file that is missing, not UTF-8, or has a line that is not an object.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise FailuresError(f"{path}: no such file; expected JSON lines with prompt and target") from error
    except OSError as error:
        raise FailuresError(f"{path}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        where = f"{path}, line {number}"
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise FailuresError(f"{where}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error
        if not text:
            continue
        try:
            row = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deeply")
            raise FailuresError(f"{where}: broken JSON ({reason}); expected one object a line") from error
        if not isinstance(row, dict):
            raise FailuresError(f"{where}: found {kind_of(row)}; expected an object with prompt and target")
        yield number, row


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


def tokenize(failure: Failure, tokenizer: PreTrainedTokenizerBase, context: int | None = None) -> Tokens:
    """Token ids of prompt and target, so that generating from the prompt's ids can give the target's.

    The prompt's ids are what the tokenizer gives for the prompt alone (with its BOS token, if it adds
    one): they are what a user's ``generate`` call starts from. The target's ids continue them as the
    joined text does; where a token of the joined text crosses the boundary, the target is encoded as
    a continuation of its own. Raises FailuresError for a target longer than ``context`` leaves room
    for, or that the tokenizer cannot write.
    """
    text, special, prompt = _prompt(failure, tokenizer)
    target = _target_ids(tokenizer, prompt, text, failure.target, special)
    unknown = tokenizer.unk_token_id
    if not target or (unknown is not None and unknown != tokenizer.eos_token_id and unknown in target):
        raise FailuresError(
            f"failure {failure.id!r}: the tokenizer cannot write the target {failure.target!r}; "
            "expected text that its vocabulary covers"
        )
    if context is not None and len(prompt) + len(target) > context:
        raise FailuresError(
            f"failure {failure.id!r}: prompt and target take {len(prompt)} + {len(target)} tokens; "
            f"the model's context is {context}; shorten them"
        )
    return Tokens(failure.id, tuple(prompt), tuple(target))


def prompt_ids(failure: Failure, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids of the prompt alone, as ``tokenize`` gives them; the target is not looked at."""
    return tuple(_prompt(failure, tokenizer)[2])


def _prompt(failure: Failure, tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool, list[int]]:
    """The prompt as text, whether special tokens go around it, and its ids."""
    text, special = failure.prompt, True
    if failure.messages:
        text, special = _chat(failure, tokenizer), False
    ids = _encode(tokenizer, text, special)
    if not ids:
        raise FailuresError(
            f"failure {failure.id!r}: the prompt has no tokens and the tokenizer adds none; expected at least one"
        )
    return text, special, ids


def _chat(failure: Failure, tokenizer: PreTrainedTokenizerBase) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise FailuresError(
            f"failure {failure.id!r} has messages, but the tokenizer has no chat template; give a prompt instead"
        )
    rendered = tokenizer.apply_chat_template(
        [dict(message) for message in failure.messages], tokenize=False, add_generation_prompt=True
    )
    return str(rendered)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    """Ids of a text that something follows: without the EOS that some tokenizers put behind it."""
    coded = tokenizer(text, add_special_tokens=special, return_special_tokens_mask=True, verbose=False)
    ids, mask = list(coded["input_ids"]), list(coded["special_tokens_mask"])
    while ids and mask[-1] and ids[-1] == tokenizer.eos_token_id and len(ids) > 1:
        ids.pop(), mask.pop()
    return ids


def _target_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], text: str, target: str, special: bool
) -> list[int]:
    joined = _encode(tokenizer, text + target, special)
    if joined[: len(prompt)] == prompt:
        return joined[len(prompt) :]

    def written(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    start = written(prompt)
    alone = _encode(tokenizer, target, False)
    # SentencePiece tokenizers put a space before a text's first word; behind an anchor they do not.
    anchors = [_encode(tokenizer, anchor, False) for anchor in ("\n", "=", "a")]
    behind = [_encode(tokenizer, anchor + target, False) for anchor in ("\n", "=", "a")]
    cut = [whole[len(lead) :] for lead, whole in zip(anchors, behind, strict=True) if whole[: len(lead)] == lead]
    for ids in (alone, *cut):
        if written(prompt + ids) == start + target:
            return ids
    return []


def kind_of(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _near(key: str, row: Mapping[str, Any]) -> str:
    hint = nearest(key, [name for name in row if name not in KEYS])
    return f" ({hint.replace('did you mean', 'is it').rstrip('?')}?)" if "did you mean" in hint else ""


def _unknown(row: Mapping[str, Any]) -> str:
    return f"no prompt{_near('prompt', row)}"
