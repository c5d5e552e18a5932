"""How well a model answers failures: under teacher forcing and when it writes freely."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmrepair.failures import Failure, Tokens
from lmrepair.measure.texts import TextScores, text_scores
from lmrepair.model import Net, Preference, greedy, settled


@dataclass(frozen=True)
class Answer:
    """What a model makes of one failure, a value for each of the target's n positions.

    Under teacher forcing: ``preferred`` is the most likely token (the best other one in a tie);
    ``rank`` the wanted token's place, 1 the best, ties counted against it; ``gap`` the probability
    of the wanted token minus that of the best other one, between −1 and 1. ``written`` is what free
    greedy decoding gives, at most n ids, the last of them the first that ends a text; None if not asked for.
    """

    tokens: Tokens
    preferred: tuple[int, ...]
    rank: tuple[int, ...]
    gap: tuple[float, ...]
    written: tuple[int, ...] | None

    @property
    def holds(self) -> bool:
        """Whether the target comes out, preferred at every position and written freely."""
        return self.preferred == self.written == self.tokens.target

    @property
    def right(self) -> int:
        """How many positions are preferred."""
        return sum(said == wanted for said, wanted in zip(self.preferred, self.tokens.target, strict=True))

    @property
    def match(self) -> float:
        """The share of target positions that are preferred."""
        return self.right / len(self.tokens.target)


@dataclass(frozen=True)
class Scores:
    """Shares and means over failures (or all their target tokens), between 0 and 1.

    ``token_match``: target tokens preferred under teacher forcing (all tokens alike). ``exact_match``:
    targets preferred whole. ``greedy_match``: targets that free-running greedy decoding writes exactly.
    The others compare texts, failure by failure: ``teacher_…`` the preferred tokens, ``greedy_…`` the
    freely written ones, both with the target. None: not asked for.
    """

    failures: int
    tokens: int
    token_match: float
    exact_match: float
    greedy_match: float | None
    teacher_bleu: float | None = None
    teacher_rouge_l: float | None = None
    teacher_edit_similarity: float | None = None
    greedy_bleu: float | None = None
    greedy_rouge_l: float | None = None
    greedy_edit_similarity: float | None = None


def answers(
    net: Net,
    rows: Sequence[Failure | Tokens],
    generate: bool = True,
    drafts: Sequence[Sequence[int]] | None = None,
) -> list[Answer]:
    """What the net, as it is now, makes of each row; free greedy text too if ``generate``.

    ``drafts``: token ids that the free texts probably are; where they are, they are read instead of written, which
    takes less time and changes nothing.
    """
    tokens = [item if isinstance(item, Tokens) else net.tokenize([item])[0] for item in rows]
    if not tokens:
        return []
    with settled(net.model):
        written: Sequence[tuple[int, ...] | None] = (
            greedy(net, tokens, drafts=drafts) if generate else [None] * len(tokens)
        )
        preferred: list[int] = []
        rank: list[int] = []
        gap: list[float] = []
        with torch.inference_mode():
            for batch in net.batches(tokens):
                logits = net.logits(batch)
                found = Preference.of(logits, batch.wanted)
                preferred += torch.where(found.gap < 0, batch.wanted, found.rival).tolist()
                rank += _ranks(logits, batch.wanted).tolist()
                gap += ((-found.loss).exp() - (found.gap - found.loss).exp()).tolist()
    made, at = [], 0
    for item, ids in zip(tokens, written, strict=True):
        here = slice(at, at := at + len(item.target))
        made.append(Answer(item, tuple(preferred[here]), tuple(rank[here]), tuple(gap[here]), ids))
    return made


def _ranks(logits: Tensor, wanted: Tensor) -> Tensor:
    """1 + how many other tokens are not below the wanted one [N], of logits [N, V]; the last where it is NaN."""
    below = logits < logits.gather(1, wanted[:, None])
    return logits.shape[1] - below.sum(dim=1)


def scores(net: Net, found: Sequence[Answer], texts: bool = True) -> Scores:
    """Sum answers up. With ``texts``, BLEU, ROUGE-L and edit similarity too.

    Raises UsageError where those are asked for and the extra ``bench`` is not installed.
    """
    if not found:
        return Scores(0, 0, 0.0, 0.0, 0.0)
    tokens = sum(len(item.tokens.target) for item in found)
    written = [item.written for item in found if item.written is not None]
    free = len(written) == len(found)
    teacher = _mean_scores(teacher_texts(net, found)) if texts else (None, None, None)
    greedy = _mean_scores(greedy_texts(net, found)) if texts and free else (None, None, None)
    return Scores(
        failures=len(found),
        tokens=tokens,
        token_match=sum(item.right for item in found) / tokens,
        exact_match=sum(item.right == len(item.tokens.target) for item in found) / len(found),
        greedy_match=statistics.fmean(item.written == item.tokens.target for item in found) if free else None,
        teacher_bleu=teacher[0],
        teacher_rouge_l=teacher[1],
        teacher_edit_similarity=teacher[2],
        greedy_bleu=greedy[0],
        greedy_rouge_l=greedy[1],
        greedy_edit_similarity=greedy[2],
    )


def evaluate(net: Net, failures: Sequence[Failure | Tokens], texts: bool = False) -> Scores:
    """Score a net, as it is now, on failures (arXiv 2503.12899 calls the token share ExactMatch).

    ``texts``: BLEU, ROUGE-L and edit similarity too; they need the extra ``bench`` (UsageError without it).
    """
    return scores(net, answers(net, failures), texts)


def teacher_texts(net: Net, found: Iterable[Answer]) -> list[tuple[str, str]]:
    """(preferred, target) as texts, answer by answer."""
    decode = decoder(net)
    return [(decode(item.preferred), decode(item.tokens.target)) for item in found]


def greedy_texts(net: Net, found: Iterable[Answer]) -> list[tuple[str, str]]:
    """(freely written, target) as texts, up to the token that ends a text; answers without free text are left out."""
    decode, ends = decoder(net), net.ends
    return [
        (decode(_before_end(item.written, ends)), decode(_before_end(item.tokens.target, ends)))
        for item in found
        if item.written is not None
    ]


def decoder(net: Net) -> Callable[[Sequence[int]], str]:
    """Token ids → text, with special tokens spelled out and no space tidied away."""
    return lambda ids: str(
        net.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def _before_end(ids: Sequence[int], ends: frozenset[int]) -> Sequence[int]:
    """What comes before the first token that ends a text: generate fills up with padding behind it."""
    return next((ids[:at] for at, token in enumerate(ids) if token in ends), ids)


def _mean_scores(pairs: Sequence[tuple[str, str]]) -> tuple[float, float, float]:
    found: list[TextScores] = [text_scores(written, target) for written, target in pairs]
    return (
        statistics.fmean(item.bleu for item in found),
        statistics.fmean(item.rouge_l for item in found),
        statistics.fmean(item.edit_similarity for item in found),
    )
