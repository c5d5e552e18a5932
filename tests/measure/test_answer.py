"""Answers against plain full forward passes; scores against their definitions."""

from __future__ import annotations

import sys

import oracle
import oracle_models
import pytest
import torch
from oracle_models import FAILURES, State

from lmrepair import UsageError, answers, diagnose, evaluate, scores
from lmrepair.failures.tokens import Tokens
from lmrepair.measure.answer import Answer, greedy_texts, teacher_texts
from lmrepair.measure.texts import text_scores


@pytest.mark.parametrize("kind", oracle_models.KINDS)
def test_answers_are_those_of_a_plain_loop(kind: str) -> None:
    net = oracle_models.net(kind)
    before = State.of(net)
    found = answers(net, FAILURES)
    assert not before.changed(net)
    assert [item.tokens for item in found] == net.tokenize(FAILURES)
    for item in found:
        prompt, target = item.tokens.prompt, item.tokens.target
        rows = oracle.logits(net.model, [*prompt, *target])[len(prompt) - 1 : -1]
        for at, (row, wanted) in enumerate(zip(rows, target, strict=True)):
            chances = row.softmax(0)
            others = [float(chance) for token, chance in enumerate(chances) if token != wanted]
            assert item.preferred[at] == int(row.argmax())
            assert item.rank[at] == 1 + sum(other >= float(chances[wanted]) for other in others)
            assert item.gap[at] == pytest.approx(float(chances[wanted]) - max(others), abs=1e-5)
        assert item.written == tuple(oracle.greedy(net.model, prompt, len(target)))


def test_answers_agree_with_the_diagnosis() -> None:
    net = oracle_models.net()
    for item, found in zip(answers(net, FAILURES, generate=False), diagnose(net, FAILURES), strict=True):
        wrong = {mistake.position: mistake.said for mistake in found.mistakes}
        assert item.written is None
        assert item.match == pytest.approx(found.match)
        for at, said in enumerate(item.preferred):
            assert said == wrong.get(at, item.tokens.target[at])
            assert (item.rank[at] > 1) == (item.gap[at] <= 0) == (at in wrong)


def test_ties_count_against_the_wanted_token() -> None:
    net = oracle_models.net()
    with torch.no_grad():
        net.model.lm_head.weight[7] = net.model.lm_head.weight[9]
    prompt = net.tokenize(FAILURES[:1])[0].prompt
    for wanted, other in ((7, 9), (9, 7)):
        (item,) = answers(net, [Tokens("", prompt, (wanted,))])
        logits = oracle.logits(net.model, prompt)[-1]
        assert item.rank[0] == 2 + int((logits > logits[wanted]).sum())
        assert item.preferred[0] == (other if item.rank[0] == 2 else int(logits.argmax()))


def test_nobody_has_no_answers() -> None:
    net = oracle_models.net()
    assert answers(net, []) == []
    assert evaluate(net, []).failures == scores(net, []).failures == 0


def test_scores_of_texts_are_means_over_failures() -> None:
    net = oracle_models.net()
    found = answers(net, FAILURES)
    right = found[2].tokens.target
    found.append(Answer(found[2].tokens, right, (1,) * len(right), (0.5,) * len(right), right))
    total = scores(net, found)
    for name, pairs in (("teacher", teacher_texts(net, found)), ("greedy", greedy_texts(net, found))):
        each = [text_scores(*pair) for pair in pairs]
        assert each[-1].exact
        for figure in ("bleu", "rouge_l", "edit_similarity"):
            mean = sum(getattr(item, figure) for item in each) / 5
            assert getattr(total, f"{name}_{figure}") == pytest.approx(mean)
            assert 0.2 <= mean < 1
    assert [target for _, target in teacher_texts(net, found)] == [*(f.target for f in FAILURES), FAILURES[2].target]


def test_free_text_ends_where_the_model_ends_it() -> None:
    net = oracle_models.net()
    tokens = net.tokenize(FAILURES[:1])[0]
    item = Answer(tokens, tokens.target, (1,), (1.0,), (*tokens.target[:2], 1, 0, 0))
    ((written, target),) = greedy_texts(net, [item])
    assert target.startswith(written)
    assert "<" not in written
    ended = Answer(Tokens("", tokens.prompt, (*tokens.target, 1)), (), (), (), (*tokens.target, 1))
    assert greedy_texts(net, [ended]) == [(target, target)]


def test_what_was_not_asked_for_is_none() -> None:
    net = oracle_models.net()
    plain = evaluate(net, FAILURES)
    assert plain.greedy_match is not None
    assert plain.teacher_bleu is plain.greedy_bleu is None
    forced = scores(net, answers(net, FAILURES, generate=False))
    assert forced.greedy_match is forced.greedy_rouge_l is None
    assert forced.teacher_bleu is not None
    assert forced.token_match == plain.token_match


def test_only_texts_need_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    net = oracle_models.net()
    for module in ("sacrebleu.metrics", "rouge_score.rouge_scorer", "rapidfuzz.distance.Levenshtein"):
        monkeypatch.setitem(sys.modules, module, None)
    assert evaluate(net, FAILURES).failures == 4
    with pytest.raises(UsageError, match="bench"):
        evaluate(net, FAILURES, texts=True)
