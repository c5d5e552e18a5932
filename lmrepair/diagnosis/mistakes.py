"""List a model's mistakes: the target positions at which it prefers another token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmrepair.failures import Failure, Tokens
from lmrepair.model import TOKENS_AT_ONCE, Batch, Net, Preference, settled

FEW_ROWS, ROWS_AT_ONCE = 4, 32  # looked at before it is asked whether there are enough: as many as are still missing


@dataclass(frozen=True)
class Mistake:
    """One position of a target where the model, fed prompt and target so far, prefers another token.

    ``position`` counts from the target's first token; ``gap`` ≥ 0 is the logit of ``said`` minus the
    logit of ``wanted``.
    """

    position: int
    wanted: int
    said: int
    gap: float


@dataclass(frozen=True)
class Diagnosis:
    """A failure's tokens and its mistakes, in the order of the target; none means it is answered rightly."""

    tokens: Tokens
    mistakes: tuple[Mistake, ...]

    @property
    def match(self) -> float:
        """The share of target positions that are preferred."""
        return 1.0 - len(self.mistakes) / len(self.tokens.target)


def diagnose(net: Net, failures: Sequence[Failure | Tokens], at_once: int = TOKENS_AT_ONCE) -> list[Diagnosis]:
    """Teacher-forced diagnosis, one forward pass for each batch of failures.

    The result does not depend on what a failure is batched with, nor on the tokenizer's padding side.
    """
    tokens = [item if isinstance(item, Tokens) else net.tokenize([item])[0] for item in failures]
    if not tokens:
        return []
    with settled(net.model):
        batches = net.batches(tokens, at_once)
        return diagnoses(batches, net.prefer(batches))


def first_failing(net: Net, failures: Sequence[Failure], most: int) -> list[Failure]:
    """The first failures that the net makes a mistake on, at most so many; read a few at a time, no further."""
    found: list[Failure] = []
    start = 0
    while start < len(failures) and len(found) < most:
        part = failures[start : start + min(ROWS_AT_ONCE, max(FEW_ROWS, most - len(found)))]
        found += [row for row, item in zip(part, diagnose(net, part), strict=True) if item.mistakes]
        start += len(part)
    return found[:most]


def diagnoses(batches: Sequence[Batch], preference: Preference, margin: float = 0.0) -> list[Diagnosis]:
    """Mistakes of every failure of the batches, given what the model prefers at all their positions.

    With a ``margin``, positions that are preferred by no more than that are listed too.
    """
    gaps, rivals = preference.gap.tolist(), preference.rival.tolist()
    found, at = [], 0
    for batch in batches:
        for tokens in batch.tokens:
            mistakes = tuple(
                Mistake(position, wanted, rivals[at + position], gaps[at + position])
                for position, wanted in enumerate(tokens.target)
                if not gaps[at + position] < -margin
            )
            found.append(Diagnosis(tokens, mistakes))
            at += len(tokens.target)
    return found
