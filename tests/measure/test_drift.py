"""Drift against the oracle, and evaluation on a known case."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import oracle
import oracle_models
import pytest
import torch
from oracle_models import FAILURES, State, bold_star

import lmrepair.measure.drift as drift_module
from lmrepair import Drift, FailuresError, Reference, UsageError, evaluate, measure_drift, read_reference
from lmrepair.failures.reference import read_kinds
from lmrepair.loop.loop import repair_each
from lmrepair.measure.drift import _Base, measure_drift_by_kind, worst_first
from lmrepair.model.statistics import windows

TEXT = Reference("test", ("for i in range(10):\n    print(i)\n", "the quick brown fox", "a" * 400))


@pytest.mark.parametrize("kind", oracle_models.KINDS)
def test_drift_is_the_oracles(kind: str) -> None:
    net = oracle_models.net(kind)
    patches = [result.patch for result in repair_each(net, FAILURES[:2], bold_star(learning_rate=0.1)) if result.patch]
    before = State.of(net)
    found = measure_drift(net, patches, TEXT)
    assert not before.changed(net)
    untouched = copy.deepcopy(net.model)
    texts = [item.ids for item in windows(net, TEXT.texts)]
    assert max(map(len, texts)) == 96
    for patch, drift in zip(patches, found, strict=True):
        with patch.on(net):
            kl, agreement, tokens = oracle.drift(untouched, net.model, texts)
        assert drift.kl == pytest.approx(kl, rel=1e-3)
        assert drift.agreement == pytest.approx(agreement, abs=2e-3)
        assert drift.tokens == tokens
        assert measure_drift(net, [patch], TEXT) == [drift]
        assert drift.perplexity_before == pytest.approx(perplexity(untouched, texts), rel=1e-4)
        with patch.on(net):
            assert drift.perplexity_after == pytest.approx(perplexity(net.model, texts), rel=1e-4)
        assert drift.perplexity_after != drift.perplexity_before


def perplexity(model: Any, texts: list[tuple[int, ...]]) -> float:
    said = [oracle.logits(model, ids).log_softmax(1) for ids in texts]
    losses = [-rows[at, ids[at + 1]] for rows, ids in zip(said, texts, strict=True) for at in range(len(ids) - 1)]
    return math.exp(sum(map(float, losses)) / len(losses))


@pytest.mark.parametrize("numbers", [1, 700, 1 << 30])
def test_how_many_rows_are_compared_at_once_does_not_matter(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = oracle_models.net()
    patches = [result.patch for result in repair_each(net, FAILURES[:1], bold_star(learning_rate=0.1)) if result.patch]
    (whole,) = measure_drift(net, patches, TEXT)
    monkeypatch.setattr(drift_module, "NUMBERS_IN_CACHE", numbers)
    (found,) = measure_drift(net, patches, TEXT)
    assert (found.agreement, found.tokens) == (whole.agreement, whole.tokens)
    for name in ("kl", "perplexity_before", "perplexity_after"):
        assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-9)


def test_drift_by_kind_shows_the_worst_kind_first() -> None:
    net = oracle_models.net()
    patches = [result.patch for result in repair_each(net, FAILURES[:2], bold_star(learning_rate=0.1)) if result.patch]
    kinds = [
        Reference(name, texts)
        for name, texts in (("fox", TEXT.texts[1:2]), ("a", TEXT.texts[2:]), ("code", TEXT.texts[:1]))
    ]
    found = measure_drift_by_kind(net, patches, kinds)
    assert len(found) == 2
    for index, by_kind in enumerate(found):
        kls = [drift.kl for drift in by_kind.values()]
        assert kls == sorted(kls, reverse=True)
        for kind in kinds:
            assert by_kind[kind.name] == measure_drift(net, patches, kind)[index]
    with pytest.raises(UsageError, match="two have one name"):
        measure_drift_by_kind(net, patches, [kinds[0], kinds[0]])
    nothing = {"small": Drift(0.1, 1, 1), "broken": Drift(math.nan, 0, 1), "large": Drift(0.2, 1, 1)}
    assert list(worst_first(nothing)) == ["broken", "large", "small"]


def test_reference_text(tmp_path: Path) -> None:
    default = read_reference()
    assert len(default.texts) == 22
    assert default.name.startswith("default@")
    (tmp_path / "t.txt").write_text("some text")
    assert read_reference(tmp_path / "t.txt").texts == ("some text",)
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert read_reference(tmp_path / "t.jsonl").texts == ("a", "b")
    for content, said in ((b'{"txt": 1}', "line 1: no text"), (b"", "no reference text"), (b'{"text": " "}', "no ref")):
        (tmp_path / "bad.jsonl").write_bytes(content)
        with pytest.raises(FailuresError, match=said):
            read_reference(tmp_path / "bad.jsonl")
    (tmp_path / "kinds.jsonl").write_text('{"text": "a", "kind": "x"}\n{"text": "b"}\n{"text": "c", "kind": "x"}\n')
    assert {item.name.split("@")[0]: item.texts for item in read_kinds(tmp_path / "kinds.jsonl")} == {
        "x": ("a", "c"),
        "kinds": ("b",),
    }
    assert sum(len(item.texts) for item in read_kinds()) == len(default.texts)
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "kind": 1}')
    with pytest.raises(FailuresError, match="line 1: the kind is no text"):
        read_kinds(tmp_path / "bad.jsonl")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(FailuresError, match="UTF-8"):
        read_reference(tmp_path / "bad.txt")
    with pytest.raises(FailuresError, match="too short"):
        windows(oracle_models.net(), [""])


def test_scores() -> None:
    net = oracle_models.net()
    tokens = net.tokenize(FAILURES)
    scores = evaluate(net, FAILURES)
    wrong = [len(oracle.mistakes(net.model, item.prompt, item.target)) for item in tokens]
    count = sum(len(item.target) for item in tokens)
    assert (scores.failures, scores.tokens) == (4, count)
    assert scores.token_match == pytest.approx(1 - sum(wrong) / count)
    assert scores.exact_match == scores.greedy_match == wrong.count(0) / 4
    for result in repair_each(net, FAILURES[:1], bold_star(learning_rate=0.1)):
        assert result.patch is not None
        with result.patch.on(net):
            after = evaluate(net, FAILURES[:1])
        assert (after.token_match, after.exact_match, after.greedy_match) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("size", [1e-4, 0.5, 30.0])
def test_differences_of_any_size_are_summed_as_in_float64(size: float) -> None:
    """Logits that moved by less than one, by more, and one that is out of the question before or afterwards."""
    generator = torch.Generator().manual_seed(3)
    before = 4 * torch.randn(7, 50, generator=generator)
    after = before + size * torch.randn(7, 50, generator=generator)
    before[0, 0] = after[0, 0] = before[1, 1] = float("-inf")
    found = _Base.of(before, torch.full((7,), 2)).compare(after)[:, 0]
    p, q = (logits.double().softmax(dim=1) for logits in (before, after))
    wanted = torch.where(p > 0, p * (p / q).log(), 0.0).sum(dim=1)
    assert torch.allclose(found, wanted, rtol=2e-3 if size < 0.01 else 1e-5)
    after[2, 3] = float("-inf")
    assert float(_Base.of(before, torch.full((7,), 2)).compare(after)[2, 0]) == float("inf")
