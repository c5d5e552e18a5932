"""Text metrics against their libraries and against slow versions; intervals against all resamples there are."""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from difflib import SequenceMatcher

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from rapidfuzz.distance import Levenshtein

from lmrepair.errors import UsageError
from lmrepair.measure.intervals import Interval, bootstrap, paired
from lmrepair.measure.texts import code_tokens, corpus_bleu, text_scores

PAIRS = [
    ("x = foo(a, b)\n", "x = foo(a, c)\n"),
    ("a == b", "a != b"),
    ("A", "a"),
    ("df.groupby('x').sum()", "df.groupby('X').mean()"),
    ("größe = 'naïve'", "größe = 'naive'"),
    ("名前 = 一覧[0]", "名前 = 一覧[1]"),
    ("mov eax, 0x10", "mov ebx, 0x10"),
    ("tar -xzf {{file}} --verbose", "tar -xf {{file}}"),
    ("return", "return"),
    ("", "return x"),
    ("a b c d e f g", "g f e d c b a"),
]


# --- slow versions, on tokens ---------------------------------------------------------------------


def slow_bleu(written: list[str], target: list[str]) -> float:
    """Sentence BLEU: exponential smoothing, as many n-gram orders (at most 4) as the written text has."""
    logs, halving = [], 1.0
    for n in range(1, 5):
        have = Counter(tuple(written[at : at + n]) for at in range(len(written) - n + 1))
        wanted = Counter(tuple(target[at : at + n]) for at in range(len(target) - n + 1))
        total, right = sum(have.values()), sum((have & wanted).values())
        if not total:
            break
        if n == 1 and not right:
            return 0.0
        if not right:
            halving *= 2
        logs.append(math.log(right / total if right else 1 / (halving * total)))
    if not logs:
        return 0.0
    short = min(0.0, 1 - len(target) / len(written))
    return math.exp(short + sum(logs) / len(logs))


def slow_rouge(written: list[str], target: list[str]) -> float:
    def longest(a: tuple[str, ...], b: tuple[str, ...]) -> int:
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, j in itertools.product(range(len(a)), range(len(b))):
            table[i + 1][j + 1] = table[i][j] + 1 if a[i] == b[j] else max(table[i][j + 1], table[i + 1][j])
        return table[-1][-1]

    common = longest(tuple(written), tuple(target))
    return 2 * common / (len(written) + len(target)) if common else 0.0


def slow_edits(written: str, target: str) -> float:
    row = list(range(len(target) + 1))
    for i, a in enumerate(written, start=1):
        before, row = row, [i] + [0] * len(target)
        for j, b in enumerate(target, start=1):
            row[j] = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
    return 1 - row[-1] / max(len(written), len(target), 1)


# --- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", []),
        (" \n\t ", []),
        ("if a != b:\n    a //= 2", ["if", "a", "!=", "b", ":", "a", "//=", "2"]),
        ("f(x)->y", ["f", "(", "x", ")", "->", "y"]),
        ("x=1.5e-3+0xFF+1_000j", ["x", "=", "1.5e-3", "+", "0xFF", "+", "1_000j"]),
        ("a[1:2]...", ["a", "[", "1", ":", "2", "]", "..."]),
        ("1...", ["1", "..."]),
        ("a.b(.5)", ["a", ".", "b", "(", ".5", ")"]),
        ("print('hi there')", ["print", "(", "'", "hi", "there", "'", ")"]),
        ("ls -l | grep x && rm --force", ["ls", "-", "l", "|", "grep", "x", "&&", "rm", "--", "force"]),
        ("Größe_2 = данные", ["Größe_2", "=", "данные"]),
        ("नमस्ते = 1", ["नमस्ते", "=", "1"]),  # marks inside the name
        ("a\u0301b + c", ["a\u0301b", "+", "c"]),
        ("😀=x", ["😀", "=", "x"]),
    ],
)
def test_code_tokens(text: str, tokens: list[str]) -> None:
    assert code_tokens(text) == tokens


@given(st.text())
def test_nothing_but_white_space_is_lost(text: str) -> None:
    assert "".join(code_tokens(text)) == "".join(text.split())


@given(st.text(), st.text())
def test_white_space_between_tokens_does_not_matter(one: str, other: str) -> None:
    tokens = code_tokens(one) + code_tokens(other)
    assert len(code_tokens(one + "\n    " + other)) <= len(tokens)
    assert code_tokens(one + "\n    " + other) == code_tokens(one + " " + other)


# --- pairs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("written", "target"), PAIRS)
def test_scores_are_those_of_the_libraries(written: str, target: str) -> None:
    from rouge_score import rouge_scorer
    from sacrebleu.metrics import BLEU

    found = text_scores(written, target)
    have, wanted = code_tokens(written), code_tokens(target)

    class Tokenizer:
        def tokenize(self, text: str) -> list[str]:
            return code_tokens(text)

    bleu = BLEU(tokenize="none", effective_order=True).sentence_score(" ".join(have), [" ".join(wanted)]).score / 100
    rouge = rouge_scorer.RougeScorer(["rougeL"], tokenizer=Tokenizer()).score(target, written)["rougeL"].fmeasure
    assert found.bleu == pytest.approx(bleu)
    assert found.rouge_l == pytest.approx(rouge)
    assert found.edit_similarity == pytest.approx(Levenshtein.normalized_similarity(written, target))
    assert found.exact == (written == target)


@pytest.mark.parametrize(("written", "target"), PAIRS)
def test_scores_are_those_of_slow_versions(written: str, target: str) -> None:
    found = text_scores(written, target)
    have, wanted = code_tokens(written), code_tokens(target)
    assert found.bleu == pytest.approx(slow_bleu(have, wanted))
    assert found.rouge_l == pytest.approx(slow_rouge(have, wanted))
    assert found.edit_similarity == pytest.approx(slow_edits(written, target))


@pytest.mark.parametrize(("one", "other"), [("a == b", "a != b"), ("Value", "value"), ("x[0]", "x(0)")])
def test_operators_and_case_count(one: str, other: str) -> None:
    """rouge_score by itself sees no difference in some of these."""
    from rouge_score import rouge_scorer

    found = text_scores(one, other)
    assert not found.exact
    assert max(found.bleu, found.rouge_l, found.edit_similarity) < 1
    assert text_scores(one, one) == text_scores(other, other)
    prose = rouge_scorer.RougeScorer(["rougeL"]).score(one, other)["rougeL"].fmeasure
    assert prose == 1.0


def test_empty_texts() -> None:
    nothing = text_scores("", "")
    assert (nothing.exact, nothing.bleu, nothing.rouge_l, nothing.edit_similarity) == (True, 1, 1, 1)
    for written, target in (("", "x = 1"), ("x = 1", ""), ("\n", "x = 1")):
        found = text_scores(written, target)
        assert (found.exact, found.bleu, found.rouge_l) == (False, 0, 0)
    assert text_scores("\n", "").edit_similarity == 0


@settings(max_examples=60)
@given(st.text(max_size=30), st.text(max_size=30))
def test_scores_are_shares_and_one_for_equal_texts(written: str, target: str) -> None:
    for a, b in ((written, target), (target, target)):
        found = text_scores(a, b)
        for value in (found.bleu, found.rouge_l, found.edit_similarity):
            assert 0 <= value <= 1
    assert found.exact
    assert (found.bleu, found.rouge_l, found.edit_similarity) == pytest.approx((1, 1, 1))


# --- corpora --------------------------------------------------------------------------------------


def test_corpus_bleu_is_the_librarys() -> None:
    from sacrebleu.metrics import BLEU

    written, targets = [pair[0] for pair in PAIRS], [pair[1] for pair in PAIRS]
    apart = [" ".join(code_tokens(text)) for text in written], [[" ".join(code_tokens(text)) for text in targets]]
    wanted = BLEU(tokenize="none", effective_order=True).corpus_score(*apart).score / 100
    assert 0 < wanted < 1
    assert corpus_bleu(written, targets) == pytest.approx(wanted)
    assert corpus_bleu(targets, targets) == 1.0 >= text_scores("ab cd ef", "ab cd ef").bleu
    assert corpus_bleu(["return"], ["return"]) == pytest.approx(1)  # without effective order: 0


def test_transposed_references_are_refused() -> None:
    """sacrebleu takes [[r1], [r2]] for [[r1, r2]] and gives 100 where the first pair agrees."""
    from sacrebleu.metrics import BLEU

    written, targets = ["a b c d e", "f g h i j"], ["a b c d e", "z"]
    assert BLEU(force=True).corpus_score(written, [[target] for target in targets]).score == pytest.approx(100)
    assert corpus_bleu(written, targets) < 0.9
    for wrong in ([[target] for target in targets], [targets], targets[:1], [*targets, "k"], "ab", [b"a", b"b"]):
        with pytest.raises(UsageError, match="expected as many|flat list"):
            corpus_bleu(written, wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="flat list"):
        corpus_bleu("ab", targets)
    with pytest.raises(UsageError, match="no texts"):
        corpus_bleu([], [])


@pytest.mark.parametrize(
    ("library", "module"),
    [("sacrebleu", "sacrebleu.metrics"), ("rouge_score", "rouge_score.rouge_scorer"),
     ("rapidfuzz", "rapidfuzz.distance.Levenshtein")],
)  # fmt: skip
def test_a_missing_library_is_named_with_its_extra(library: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf"{library}.*lmrepair\[bench\]"):
        text_scores("a", "b")


# --- intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[0.0, 1.0, 1.0, 5.0], [2.0, -1.0, 0.5, 0.25, 3.0]])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_bootstrap_is_the_middle_of_all_resamples(values: list[float], level: float) -> None:
    means = sorted(sum(drawn) / len(drawn) for drawn in itertools.product(values, repeat=len(values)))
    found = bootstrap(values, resamples=40_000, level=level)
    tail = (1 - level) / 2
    slack = 0.01  # in probability: that of a quantile estimated from 40,000 resamples, with room

    def quantile(share: float) -> float:
        return means[min(len(means) - 1, max(0, int(share * len(means))))]

    assert quantile(tail - slack) <= found.low <= quantile(tail + slack)
    assert quantile(1 - tail - slack) <= found.high <= quantile(1 - tail + slack)
    assert found.mean == pytest.approx(sum(values) / len(values))
    assert found.count == len(values)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(7)
    trials = 400
    hits = 0
    for trial in range(trials):
        found = bootstrap(generator.exponential(1.0, 60).tolist(), seed=trial, resamples=400, level=0.9)
        hits += found.low <= 1.0 <= found.high
    # 90 % by name; a percentile interval of 60 skewed values has somewhat less. Standard error 1.6 %.
    assert 0.83 <= hits / trials <= 0.94


def test_bootstrap_is_the_same_for_the_same_seed() -> None:
    values = [0.0, 1.0, 0.3, 0.7, 0.2]
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)
    assert bootstrap([0.25]) == Interval(0.25, 0.25, 0.25, 1)
    assert bootstrap([True, False]).mean == 0.5


def test_paired_differences() -> None:
    values, others = [0.9, 0.5, 0.7, 1.0], [0.8, 0.4, 0.6, 0.9]
    found = paired(values, others)
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))  # one by one, not as two groups
    assert paired(values, others[::-1]) == bootstrap([a - b for a, b in zip(values, others[::-1], strict=True)])
    with pytest.raises(UsageError, match="4 values and 3 others"):
        paired(values, others[:3])


@pytest.mark.parametrize("values", [[], [float("nan")], [1.0, float("inf")], [[1.0], [2.0]]])
def test_values_without_a_mean_are_refused(values: list[float]) -> None:
    with pytest.raises(UsageError, match="finite"):
        bootstrap(values)


@pytest.mark.parametrize("level", [0.0, 1.0, -1.0, float("nan")])
def test_levels(level: float) -> None:
    with pytest.raises(UsageError, match="level"):
        bootstrap([1.0], level=level)


def test_similarity_is_not_difflibs() -> None:
    """rapidfuzz's ratio, like difflib's, counts a replacement twice; ours is Levenshtein's."""
    assert text_scores("abc", "abd").edit_similarity == pytest.approx(2 / 3)
    assert SequenceMatcher(None, "abcd", "dabc").ratio() != pytest.approx(text_scores("abcd", "dabc").edit_similarity)
