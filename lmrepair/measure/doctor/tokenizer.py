"""Where a tokenizer does otherwise than people expect: found by encoding short texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lmrepair.errors import FailuresError
from lmrepair.failures import end_of_turn
from lmrepair.model import Net

SAMPLE = "Say: 3 × “Ä”,\tthen\n\n  def f(x):\n"  # capitals, accents, quotes, tabs, blank lines, indents
QUESTION: list[dict[str, str]] = [{"role": "user", "content": "Question"}]


@dataclass(frozen=True)
class Trap:
    """``kind`` in one word; ``text`` says what was found and what to do."""

    kind: str
    text: str


def turn_end(net: Net) -> tuple[str | None, str]:
    """What the chat template ends a turn with (None: no template), and why it cannot be told, if so."""
    try:
        return end_of_turn(net.tokenizer), ""
    except FailuresError as error:
        return None, str(error).partition(": ")[2]


def traps(net: Net) -> tuple[Trap, ...]:
    """All that is found, in the order of text going through a model."""
    return (*_around_texts(net), *_sizes(net), *_chats(net), *_ends(net))


def _encoded(net: Net, text: str, special: bool = True) -> list[int]:
    return list(net.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _around_texts(net: Net) -> Iterator[Trap]:
    tokenizer: Any = net.tokenizer
    bare, whole = _encoded(net, "a", False), _encoded(net, "a")
    eos = tokenizer.eos_token_id
    if eos is not None and whole[-1:] == [eos] and bare[-1:] != [eos]:
        yield Trap("eos", f"the tokenizer puts {tokenizer.eos_token} behind every text; prompts are read without it")
    lead = _encoded(net, "\n", False)
    behind = _encoded(net, "\na", False)
    if behind[: len(lead)] == lead and behind[len(lead) :] != bare:
        yield Trap(
            "prefix",
            "a text's first word has other tokens than the same word behind a line break (a space is put before it); "
            "targets are encoded as they go on behind their prompt",
        )
    ids = _encoded(net, SAMPLE, False)
    again = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if again.strip(" ") != SAMPLE.strip(" "):
        yield Trap(
            "lossy",
            "text does not come back as it was (capitals, accents, quotes, tabs or blank lines are lost); "
            "a target that the vocabulary does not cover is refused",
        )


def _sizes(net: Net) -> Iterator[Trap]:
    head, known = net.anatomy.vocabulary, len(net.tokenizer)
    table = net.model.get_input_embeddings().weight
    if known > head:
        yield Trap("outside", f"the tokenizer has {known:,} tokens, the head {head:,}: targets with others are refused")
    if head > known:
        yield Trap("unnamed", f"the head has {head:,} rows, {head - known:,} more than tokens: no text asks for them")
    if len(table) < known:
        yield Trap("embeddings", f"{known - len(table):,} tokens have no embedding; prompts with them cannot be read")


def _chats(net: Net) -> Iterator[Trap]:
    tokenizer: Any = net.tokenizer
    end, refusal = turn_end(net)
    if refusal:
        yield Trap("template", f"the chat template refuses a user's plain turn: {refusal}")
    if end is None:
        return
    text = str(tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True))
    bos = tokenizer.bos_token_id
    if bos is not None and _encoded(net, text)[:2] == [bos, bos]:
        yield Trap(
            "bos",
            f"the chat template writes {tokenizer.bos_token} and the tokenizer puts one more before a text: give chats "
            "as messages (here they are encoded without), or encode with add_special_tokens=False",
        )
    if not end:
        yield Trap("turn", "the chat template ends an answer with no token of its own: nothing teaches it to stop")
    elif tokenizer.convert_tokens_to_ids(end) not in net.ends:
        yield Trap("turn", f"{end} ends a turn, but generation does not stop at it (eos_token_id in generation_config)")


def _ends(net: Net) -> Iterator[Trap]:
    tokenizer: Any = net.tokenizer
    if tokenizer.eos_token_id is not None and net.ends and tokenizer.eos_token_id not in net.ends:
        yield Trap("stop", f"the tokenizer's {tokenizer.eos_token} is none of the tokens that generation stops at")
    if not net.ends:
        yield Trap("stop", "generation stops at no token (no eos_token_id): it runs to its limit")
    pad, table = tokenizer.pad_token_id, net.model.get_input_embeddings().weight
    if pad is None:
        yield Trap("pad", "no pad token: any other token stands in, as padding is masked")
    elif pad >= len(table):
        yield Trap("pad", f"the pad token {tokenizer.pad_token} has no embedding: another stands in, padding is masked")
