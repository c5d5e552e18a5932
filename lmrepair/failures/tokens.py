"""Token ids of prompt and target, joined at the true boundary between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmrepair.errors import FailuresError
from lmrepair.failures.rows import Failure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tokens:
    """A failure as the model reads it: the ids of the prompt, then the ids of the target."""

    id: str
    prompt: tuple[int, ...]
    target: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        return self.prompt + self.target


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
