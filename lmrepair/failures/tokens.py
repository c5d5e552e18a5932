"""Token ids of failures, joined at the true prompt/target boundary."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmrepair.errors import FailuresError
from lmrepair.failures.chats import rendered
from lmrepair.failures.rows import Failure
from lmrepair.failures.sources import is_torn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("lmrepair")


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
class _Asked:
    """The prompt as text and ids, whether special tokens go around it, and the target as text."""

    text: str
    special: bool
    ids: list[int]
    target: str


def tokenize(failure: Failure, tokenizer: PreTrainedTokenizerBase, context: int | None = None) -> Tokens:
    """Token ids of prompt and target, so that generating from the prompt's ids can give the target's.

    The prompt's ids are what the tokenizer gives for the prompt alone (with its BOS token, if it adds
    one): they are what a user's ``generate`` call starts from. The target's ids continue them as the
    joined text does; where a token of the joined text crosses the boundary, the target is encoded as
    a continuation of its own. Raises FailuresError for a target longer than ``context`` leaves room
    for, or that the tokenizer cannot write, and for what a chat template raises.
    """
    asked = _asked(failure, tokenizer)
    prompt, target = asked.ids, _target_ids(tokenizer, asked)
    unknown = tokenizer.unk_token_id
    if not target or (unknown is not None and unknown != tokenizer.eos_token_id and unknown in target):
        shown = asked.target if len(asked.target) <= 60 else asked.target[:60] + "…"
        raise FailuresError(
            f"failure {failure.id!r}: the tokenizer cannot write the target {shown!r}; "
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
    return tuple(_asked(failure, tokenizer).ids)


def _asked(failure: Failure, tokenizer: PreTrainedTokenizerBase) -> _Asked:
    text, special, target = failure.prompt, True, failure.target
    if failure.messages:
        chat = rendered(failure, tokenizer)
        text, special, target = chat.prompt, False, chat.target
    if is_torn(text) or is_torn(target):
        raise FailuresError(f"failure {failure.id!r} has half of a surrogate pair; expected well-formed Unicode")
    ids = _encode(tokenizer, text, special)
    if not ids:
        raise FailuresError(
            f"failure {failure.id!r}: the prompt has no tokens and the tokenizer adds none; expected at least one"
        )
    bos = tokenizer.bos_token_id
    if special and bos is not None and ids[:2] == [bos, bos] and text.startswith(str(tokenizer.bos_token)):
        log.warning(
            "failure %r: its prompt begins with %s and the tokenizer puts one more before it; leave it out of the "
            "prompt, or give the chat as messages",
            failure.id,
            tokenizer.bos_token,
        )
    return _Asked(text, special, ids, target)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    """Ids of a text that something follows: without the EOS that some tokenizers put behind it."""
    ids = list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    if not special:
        return ids
    bare = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and _ending(ids, ids[-1]) > _ending(bare, ids[-1]):
        ids.pop()
    return ids


def _ending(ids: list[int], token: int) -> int:
    """How many times a token stands at the end."""
    return next((at for at, found in enumerate(reversed(ids)) if found != token), len(ids))


def _target_ids(tokenizer: PreTrainedTokenizerBase, asked: _Asked) -> list[int]:
    prompt, target = asked.ids, asked.target
    joined = _encode(tokenizer, asked.text + target, asked.special)
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
