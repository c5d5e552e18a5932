"""How well a model answers failures: under teacher forcing and when it writes freely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmrepair.diagnosis import diagnose
from lmrepair.failures import Failure, Tokens
from lmrepair.net import Net, settled


@dataclass(frozen=True)
class Scores:
    """Shares over failures (or all their target tokens), between 0 and 1.

    ``token_match``: target tokens preferred under teacher forcing (all tokens alike). ``exact_match``:
    targets preferred whole. ``greedy_match``: targets that free-running greedy decoding writes exactly.
    """

    failures: int
    tokens: int
    token_match: float
    exact_match: float
    greedy_match: float


def evaluate(net: Net, failures: Sequence[Failure | Tokens]) -> Scores:
    """Score a net, as it is now, on failures (arXiv 2503.12899 calls the token share ExactMatch)."""
    found = diagnose(net, failures)
    if not found:
        return Scores(0, 0, 0.0, 0.0, 0.0)
    with settled(net.model):
        written = net.generate([item.tokens for item in found])
    tokens = sum(len(item.tokens.target) for item in found)
    mistakes = sum(len(item.mistakes) for item in found)
    return Scores(
        failures=len(found),
        tokens=tokens,
        token_match=1.0 - mistakes / tokens,
        exact_match=sum(not item.mistakes for item in found) / len(found),
        greedy_match=sum(text == item.tokens.target for text, item in zip(written, found, strict=True)) / len(found),
    )
