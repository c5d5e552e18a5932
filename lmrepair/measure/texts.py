"""Figures on pairs of texts, and how sure a mean is: BLEU, ROUGE-L, edit similarity, bootstrap intervals.

Imports no model code. The metrics come from sacrebleu, rouge_score and rapidfuzz (the extra ``bench``),
which are imported where they are used. BLEU and ROUGE-L read ``code_tokens``: their libraries' own
tokenizers are made for prose, and rouge_score's is blind to operators and to case.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from lmrepair.errors import UsageError

_OPERATORS = (
    *("<<=", ">>=", "**=", "//=", "...", "===", "!==", "<=>", '"""', "'''"),
    *("==", "!=", "<=", ">=", "->", "=>", ":=", "**", "//", "<<", ">>", "&&", "||", "::", "++", "--"),
    *("+=", "-=", "*=", "/=", "%=", "&=", "|=", "^=", "@=", "~="),
)
_TOKEN = re.compile(
    r"[^\W\d]\w*"  # a name, in any script
    r"|0[xX][0-9a-fA-F_]+|0[bB][01_]+|0[oO][0-7_]+"
    r"|(?:\d[\d_]*(?:\.(?!\.)[\d_]*)?|\.\d[\d_]*)(?:[eE][+-]?\d[\d_]*)?[jJ]?"
    rf"|{'|'.join(map(re.escape, _OPERATORS))}"
    r"|\S"
)


def code_tokens(text: str) -> list[str]:
    """The tokens of a piece of code in any language: names, numbers, operators (``!=`` is one), brackets.

    White space separates and is left out; case is kept. A string literal gives its quotes and the
    tokens of what is between them.
    """
    found: list[str] = []
    end = 0
    for match in _TOKEN.finditer(text):
        token, joined = match.group(), match.start() == end and bool(found)
        # Python's \w leaves out the marks that many scripts write inside a name.
        if joined and (_is_mark(token) or _goes_on(found[-1], token)):
            found[-1] += token
        else:
            found.append(token)
        end = match.end()
    return found


def _is_mark(token: str) -> bool:
    return len(token) == 1 and unicodedata.category(token).startswith("M")


def _goes_on(before: str, token: str) -> bool:
    """Whether a token goes on with the name that a mark interrupted."""
    return unicodedata.category(before[-1]).startswith("M") and (before + token).isidentifier()


@dataclass(frozen=True)
class TextScores:
    """How near a written text is to its target, each between 0 and 1.

    ``exact``: the same text, character by character. ``bleu``: sentence BLEU over code tokens, n-grams up
    to the order that the shorter texts have. ``rouge_l``: F-measure of the longest common subsequence
    of code tokens. ``edit_similarity``: 1 − Levenshtein distance / length of the longer text, in characters.
    """

    exact: bool
    bleu: float
    rouge_l: float
    edit_similarity: float


def text_scores(written: str, target: str) -> TextScores:
    """Scores of one pair. Two texts without a token in either (both empty, say) agree: BLEU and ROUGE-L are 1.

    Raises UsageError where the libraries of the extra ``bench`` are missing.
    """
    levenshtein = _library("rapidfuzz.distance.Levenshtein")
    scores = _rouge_scorer().score(target, written)
    blank = not code_tokens(written) and not code_tokens(target)
    return TextScores(
        exact=written == target,
        bleu=1.0 if blank else _share(_bleu().sentence_score(_spaced(written), [_spaced(target)])),
        rouge_l=1.0 if blank else float(scores["rougeL"].fmeasure),
        edit_similarity=float(levenshtein.normalized_similarity(written, target)),
    )


def corpus_bleu(written: Sequence[str], targets: Sequence[str]) -> float:
    """BLEU over all pairs together, between 0 and 1: one target for each written text, in the same order.

    N-gram orders that no text is long enough for are left out, so that equal short texts score 1.
    Raises UsageError for unequal numbers of texts, or anything but two flat lists of them: sacrebleu
    takes transposed references without a word.
    """
    for name, texts in (("written", written), ("targets", targets)):
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise UsageError(f"{name} is not a flat list of texts; give one text for each failure")
    if len(written) != len(targets):
        raise UsageError(f"{len(written)} written texts and {len(targets)} targets; expected as many of each")
    if not written:
        raise UsageError("no texts to compare; expected one pair or more")
    found = _bleu().corpus_score([_spaced(text) for text in written], [[_spaced(text) for text in targets]])
    return _share(found)


def _share(found: Any) -> float:
    """From sacrebleu's per cent, which rounding can lift above 100."""
    return min(1.0, float(found.score) / 100)


def _spaced(text: str) -> str:
    return " ".join(code_tokens(text))


def _bleu() -> Any:
    # force: no warning about texts that come in tokens already.
    return _library("sacrebleu.metrics").BLEU(tokenize="none", effective_order=True, force=True)


class _CodeTokenizer:
    def tokenize(self, text: str) -> list[str]:
        return code_tokens(text)


def _rouge_scorer() -> Any:
    return _library("rouge_score.rouge_scorer").RougeScorer(["rougeL"], tokenizer=_CodeTokenizer())


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UsageError(
            f"text metrics need {name.split('.')[0]}, which is not installed; pip install 'lmrepair[bench]'"
        ) from error
