"""Drift against the oracle, and evaluation on a known case."""

from __future__ import annotations

import copy
from pathlib import Path

import oracle
import oracle_models
import pytest
from oracle_models import FAILURES, State

from lmrepair import FailuresError, Reference, Star, evaluate, measure_drift, read_reference
from lmrepair.drift import windows
from lmrepair.loop import repair_each

TEXT = Reference("test", ("for i in range(10):\n    print(i)\n", "the quick brown fox", "a" * 400))


@pytest.mark.parametrize("kind", oracle_models.KINDS)
def test_drift_is_the_oracles(kind: str) -> None:
    net = oracle_models.net(kind)
    patches = [result.patch for result in repair_each(net, FAILURES[:2], Star(learning_rate=0.1)) if result.patch]
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
    for result in repair_each(net, FAILURES[:1], Star(learning_rate=0.1)):
        assert result.patch is not None
        with result.patch.on(net):
            after = evaluate(net, FAILURES[:1])
        assert (after.token_match, after.exact_match, after.greedy_match) == (1.0, 1.0, 1.0)
