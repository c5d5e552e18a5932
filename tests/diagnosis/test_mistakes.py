"""Mistakes against a plain loop of full forward passes."""

from __future__ import annotations

import oracle
import oracle_models
import pytest
import torch
from hypothesis import given, strategies as st
from oracle_models import FAILURES

from lmrepair import Diagnosis, Failure, Mistake, Net, diagnose
from lmrepair.diagnosis import mistakes
from lmrepair.diagnosis.mistakes import diagnoses, first_failing
from lmrepair.failures.tokens import Tokens
from lmrepair.model.batches import Preference


def preferred(net: Net, prompt: tuple[int, ...], length: int) -> Tokens:
    """A failure that is none: its target is what the model prefers."""
    return Tokens("right", prompt, tuple(oracle.greedy(net.model, prompt, length)))


def half_right(net: Net) -> Tokens:
    """A target that the model prefers but for its positions 1 and 4."""
    prompt = net.tokenize(FAILURES[:1])[0].prompt
    ids = list(prompt)
    for position in range(6):
        order = oracle.logits(net.model, ids)[-1].argsort(descending=True)
        ids.append(int(order[3] if position in (1, 4) else order[0]))
    return Tokens("half", prompt, tuple(ids[len(prompt) :]))


def test_no_more_rows_are_read_than_it_takes_to_find_some(monkeypatch: pytest.MonkeyPatch) -> None:
    net = oracle_models.net()
    right = preferred(net, net.tokenize(FAILURES[:1])[0].prompt, 3)
    fine = Failure(FAILURES[0].prompt, net.tokenizer.decode(right.target))
    assert not diagnose(net, [fine])[0].mistakes
    rows = [fine, FAILURES[0], fine, FAILURES[1], FAILURES[2], FAILURES[3]]
    read: list[str] = []
    own = net.tokenize
    monkeypatch.setattr(mistakes, "ROWS_AT_ONCE", 2)
    monkeypatch.setattr(net, "tokenize", lambda some: read.extend(row.prompt for row in some) or own(some))
    assert first_failing(net, rows, 2) == [FAILURES[0], FAILURES[1]]
    assert len(read) == 4
    monkeypatch.setattr(mistakes, "ROWS_AT_ONCE", 32)
    monkeypatch.setattr(mistakes, "FEW_ROWS", 1)
    read.clear()
    assert first_failing(net, rows, 1) == [FAILURES[0]]
    assert len(read) == 2
    assert first_failing(net, rows, 9) == [*FAILURES[:4]]
    assert first_failing(net, [fine], 1) == []


@pytest.mark.parametrize("kind", oracle_models.KINDS)
def test_mistakes_are_those_of_a_plain_loop(kind: str) -> None:
    net = oracle_models.net(kind)
    tokens = [*net.tokenize(FAILURES), half_right(net), preferred(net, (0, 9, 30, 4), 5)]
    found = diagnose(net, tokens)
    assert [item.tokens for item in found] == tokens
    for item in found:
        wanted = oracle.mistakes(net.model, item.tokens.prompt, item.tokens.target)
        assert [(m.position, m.wanted, m.said) for m in item.mistakes] == [row[:3] for row in wanted]
        assert [m.gap for m in item.mistakes] == pytest.approx([row[3] for row in wanted], abs=1e-4)
    assert [m.position for m in found[-2].mistakes] == [1, 4]
    assert found[-2].match == pytest.approx(4 / 6)
    assert found[-1].mistakes == ()
    assert found[-1].match == 1.0


def test_failures_are_tokenised_on_the_way() -> None:
    net = oracle_models.net()
    assert diagnose(net, FAILURES) == diagnose(net, net.tokenize(FAILURES))


def test_no_failures_have_no_mistakes() -> None:
    assert diagnose(oracle_models.net(), []) == []


@pytest.mark.parametrize("kind", oracle_models.KINDS)
@pytest.mark.parametrize("at_once", [1, 30, 70, 10_000])
def test_what_a_failure_is_batched_with_does_not_matter(kind: str, at_once: int) -> None:
    """Not to its mistakes, and to its gaps by no more than rounding; order is kept."""
    net = oracle_models.net(kind)
    tokens = net.tokenize([*FAILURES, FAILURES[2]])
    together = diagnose(net, tokens, at_once)
    for item, alone in zip(together, [diagnose(net, [one])[0] for one in tokens], strict=True):
        assert item.tokens == alone.tokens
        assert [(m.position, m.said) for m in item.mistakes] == [(m.position, m.said) for m in alone.mistakes]
        assert [m.gap for m in item.mistakes] == pytest.approx([m.gap for m in alone.mistakes], abs=1e-4)


def test_the_padding_side_does_not_matter() -> None:
    net = oracle_models.net()
    net.tokenizer.pad_token = "</s>"
    right = diagnose(net, FAILURES)
    net.tokenizer.padding_side = "left"
    assert diagnose(net, FAILURES) == right


def test_a_tokenizer_without_padding_token_will_do() -> None:
    net = oracle_models.net()
    assert net.tokenizer.pad_token is None
    assert len(diagnose(net, FAILURES)) == len(FAILURES)


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 9))
def test_a_gap_is_not_negative_exactly_at_a_mistake(seed: int, positions: int, vocabulary: int) -> None:
    # Whole numbers: ties are common.
    logits = torch.randint(-2, 3, (positions, vocabulary), generator=torch.Generator().manual_seed(seed)).float()
    wanted = torch.randint(0, vocabulary, (positions,), generator=torch.Generator().manual_seed(seed + 1))
    preference = Preference.of(logits, wanted)
    for row, token in enumerate(wanted.tolist()):
        others = [value for at, value in enumerate(logits[row].tolist()) if at != token]
        assert float(preference.gap[row]) == max(others) - float(logits[row, token])
        rival = int(preference.rival[row])
        assert rival != token
        assert float(logits[row, rival]) == max(others)
        loss = -float(logits[row].double().log_softmax(0)[token])
        assert float(preference.loss[row]) == pytest.approx(loss, abs=1e-5)


def listed(gaps: list[float], margin: float = 0.0) -> list[int]:
    net = oracle_models.net()
    (batch,) = net.batches([Tokens("", (0,), tuple(range(2, 2 + len(gaps))))])
    preference = Preference(torch.full((len(gaps),), 40), torch.tensor(gaps), torch.zeros(len(gaps)))
    (found,) = diagnoses([batch], preference, margin)
    assert all(isinstance(mistake, Mistake) and mistake.said == 40 for mistake in found.mistakes)
    assert all(mistake.wanted == 2 + mistake.position for mistake in found.mistakes)
    return [mistake.position for mistake in found.mistakes]


def test_a_tie_is_a_mistake_and_so_is_what_is_no_number() -> None:
    assert listed([1.0, 0.0, -0.0, -1e-6, -3.0, float("nan"), float("inf")]) == [0, 1, 2, 5, 6]


def test_a_margin_lists_what_is_barely_preferred() -> None:
    gaps = [0.5, -0.05, -0.5, -1.5]
    assert listed(gaps) == [0]
    assert listed(gaps, 0.1) == [0, 1]
    assert listed(gaps, 0.5) == [0, 1, 2]  # preferred by no more than the margin
    assert listed(gaps, 2.0) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", oracle_models.KINDS)
def test_diagnosing_leaves_the_net_as_it_was(kind: str) -> None:
    net = oracle_models.net(kind)
    net.model.train()
    net.model.requires_grad_(True)
    before = oracle_models.State.of(net)
    first = diagnose(net, FAILURES)
    assert before.changed(net) == []
    net.model.eval()
    assert diagnose(net, FAILURES) == first  # dropout was off


def test_a_bfloat16_model_is_read_in_bfloat16() -> None:
    net = oracle_models.net(dtype=torch.bfloat16)
    for item in diagnose(net, FAILURES):
        ids = torch.tensor([item.tokens.ids])
        with torch.no_grad():
            rows = net.model(input_ids=ids).logits[0, len(item.tokens.prompt) - 1 : -1].float()
        said = {m.position: m for m in item.mistakes}
        for position, (row, wanted) in enumerate(zip(rows, item.tokens.target, strict=True)):
            rest = row.clone()
            rest[wanted] = float("-inf")
            assert (float(rest.max()) >= float(row[wanted])) == (position in said)


def test_a_diagnosis_is_a_value() -> None:
    tokens = Tokens("a", (0,), (5, 6, 7, 8))
    found = Diagnosis(tokens, (Mistake(1, 6, 9, 0.5),))
    assert found == Diagnosis(tokens, (Mistake(1, 6, 9, 0.5),))
    assert found.match == 0.75


def test_targets_of_one_token_and_of_many() -> None:
    net = oracle_models.net()
    found = diagnose(net, [Failure("x", "y"), Failure("x", "y" * 60)])
    assert [len(item.tokens.target) for item in found] == [1, 60]
    for item in found:
        wanted = oracle.mistakes(net.model, item.tokens.prompt, item.tokens.target)
        assert [(m.position, m.said) for m in item.mistakes] == [row[:1] + row[2:3] for row in wanted]
