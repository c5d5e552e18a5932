"""Ranking layers and neurons, against float64 models and captum."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import oracle
import oracle_models
import pytest
import torch
from oracle_models import FAILURES
from torch import Tensor

from lmrepair import Net, UsageError
from lmrepair.diagnosis.attribution import attributions, first_mistakes, skipped_losses
from lmrepair.failures.tokens import Tokens
from lmrepair.methods import base
from lmrepair.methods.targeting import PATTERNS, Targeting, choose, locate, share_of
from lmrepair.model.batches import Batch, Preference, Sites

SHARES = ["1", "1/4", "1/16", "1/64", "1/256"]


def read(net: Net, tokens: list[Tokens] | None = None, at_once: int = 2048) -> tuple[list[Batch], Preference]:
    batches = net.batches(tokens or net.tokenize(FAILURES), at_once)
    return batches, net.prefer(batches)


def wrong_rows(net: Net, tokens: Tokens) -> list[tuple[int, int]]:
    """(position, rival) of the mistakes."""
    return [(row[0], row[2]) for row in oracle.mistakes(net.model, tokens.prompt, tokens.target)]


def with_right_ones(net: Net) -> list[Tokens]:
    """The failures, one answered rightly, and one whose first mistake is its third position."""
    prompt = net.tokenize(FAILURES[:1])[0].prompt
    said = oracle.greedy(net.model, prompt, 5)
    late = [*said[:2], (said[2] + 1) % 170 or 5, *said[3:]]
    return [*net.tokenize(FAILURES), Tokens("right", prompt, tuple(said)), Tokens("late", prompt, tuple(late))]


# --- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", oracle_models.KINDS)
@pytest.mark.parametrize("at_once", [30, 2048])
def test_skipped_losses_are_those_without_the_ffn(kind: str, at_once: int) -> None:
    net = oracle_models.net(kind)
    tokens = with_right_ones(net)
    found = skipped_losses(net, *read(net, tokens, at_once))
    firsts = [(item, wrong_rows(net, item)) for item in tokens]
    assert firsts[-2][1] == []
    assert firsts[-1][1][0][0] == 2
    for layer in range(net.layers):
        wanted = [
            oracle.skipped_loss(net.model, layer, item.prompt, item.target, wrong[0][0])
            for item, wrong in firsts
            if wrong
        ]
        assert float(found[layer]) == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)


def test_first_mistakes_are_one_for_each_failure_that_has_any() -> None:
    net = oracle_models.net()
    tokens = with_right_ones(net)
    batches, preference = read(net, tokens, 40)
    assert len(batches) > 2
    rows = first_mistakes(batches, preference)
    found = [
        (batch.tokens[batch.owner[row]], int(row)) for batch, part in zip(batches, rows, strict=True) for row in part
    ]
    assert [item.id for item, _ in found] == ["open", "sum", "say", "length", "late"]
    for item, row in found:
        batch = next(batch for batch in batches if item in batch.tokens)
        position = row - int((batch.owner < batch.tokens.index(item)).sum())
        assert position == wrong_rows(net, item)[0][0]


@pytest.mark.parametrize(
    ("layers", "count"), [("one", 1), ("1/4", 1), ("1/3", 1), ("1/2", 2), ("2/3", 2), ("3/4", 3), ("1", 3), ("0.34", 2)]
)
def test_the_layers_that_hurt_most_are_kept(layers: str, count: int) -> None:
    net = oracle_models.net()
    batches, preference = read(net)
    sites = locate(net, batches, preference, Targeting(layers=layers))
    hurt = sorted(range(3), key=lambda at: -float(skipped_losses(net, batches, preference)[at]))
    assert sites.layers == tuple(sorted(hurt[:count]))
    assert all(torch.equal(sites.columns[layer], torch.arange(48)) for layer in sites.layers)


UPPER = {"last": (2,), "upper 1/3": (2,), "upper 1/2": (1, 2), "upper 1": (0, 1, 2)}


@pytest.mark.parametrize("layers", UPPER)
def test_upper_layers_are_taken_from_the_top(layers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = oracle_models.net()
    monkeypatch.setattr("lmrepair.diagnosis.attribution.skipped_losses", lambda *_: pytest.fail("skipped"))
    assert locate(net, *read(net), Targeting(layers=layers)).layers == UPPER[layers]
    with pytest.raises(UsageError, match="'upper many' is no share"):
        Targeting(layers="upper many").check()


def test_layers_that_hurt_alike_are_kept_from_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    net = oracle_models.net()
    losses = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)
    monkeypatch.setattr("lmrepair.diagnosis.attribution.skipped_losses", lambda *_: losses)
    assert locate(net, *read(net), Targeting(layers="one")).layers == (1,)


# --- attribution ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", oracle_models.KINDS)
@pytest.mark.parametrize("by", ["probability", "contrast"])
@pytest.mark.parametrize("at_once", [30, 2048])
def test_attributions_are_those_of_autograd(kind: str, by: str, at_once: int) -> None:
    net = oracle_models.net(kind)
    tokens = with_right_ones(net)
    found = attributions(net, *read(net, tokens, at_once), layers=[0, 2], by=by)
    assert list(found) == [0, 2]
    for layer, scores in found.items():
        rows = [
            oracle.gradient_times_activation(net.model, layer, item.prompt, item.target, wrong, by)
            for item in tokens
            if (wrong := wrong_rows(net, item))
        ]
        wanted = torch.cat(rows).norm(dim=0)
        assert scores.shape == (48,)
        torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-5 * float(wanted.max()))


def by_captum(net: Net, layer: int, tokens: Tokens, wrong: list[tuple[int, int]], by: str) -> Tensor:
    from captum.attr import LayerGradientXActivation

    first = len(tokens.prompt) - 1

    def value(ids: Tensor) -> Tensor:
        logits = net.model(input_ids=ids).logits[0]
        parts = []
        for position, rival in wrong:
            row, wanted = logits[first + position], tokens.target[position]
            parts.append(row[wanted] - row[rival] if by == "contrast" else row.softmax(0)[wanted])
        return torch.stack(parts).sum()[None]

    matrix = net.anatomy.projections[layer]
    scores: Any = LayerGradientXActivation(value, matrix).attribute(
        torch.tensor([tokens.ids]), attribute_to_layer_input=True
    )
    scores = scores[0] if isinstance(scores, tuple) else scores
    return scores[0, [first + position for position, _ in wrong]].detach().double().norm(dim=0)


@pytest.mark.parametrize("kind", oracle_models.KINDS)
@pytest.mark.parametrize("by", ["probability", "contrast"])
def test_attributions_are_captums(kind: str, by: str) -> None:
    net = oracle_models.net(kind)
    (tokens,) = net.tokenize(FAILURES[3:])
    found = attributions(net, *read(net, [tokens]), layers=range(3), by=by)
    net.model.requires_grad_(True)
    for layer, scores in found.items():
        wanted = by_captum(net, layer, tokens, wrong_rows(net, tokens), by)
        torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-5 * float(wanted.max()))


def test_without_mistakes_no_neuron_is_responsible() -> None:
    net = oracle_models.net()
    found = attributions(net, *read(net, with_right_ones(net)[-2:-1]), layers=range(3))
    assert all(not scores.any() for scores in found.values())


# --- patterns and shares --------------------------------------------------------------------------


def tops(scores: dict[int, Tensor], pattern: str, share: Fraction) -> dict[int, list[int]]:
    """The choice by sorting a list of triples."""
    pools = {}
    if pattern == "global":
        pools["all"] = list(scores)
    elif pattern == "even":
        pools = {layer: [layer] for layer in scores}
    else:
        best = max(scores, key=lambda layer: float(scores[layer].square().sum()))
        pools = {best: [best]}
    chosen: dict[int, list[int]] = {}
    for layers in pools.values():
        ranked = sorted((-float(value), layer, at) for layer in layers for at, value in enumerate(scores[layer]))
        for _, layer, at in ranked[: max(1, math.ceil(share * len(ranked)))]:
            chosen.setdefault(layer, []).append(at)
    return {layer: sorted(found) for layer, found in sorted(chosen.items())}


def as_lists(sites: Sites) -> dict[int, list[int]]:
    return {layer: sites.columns[layer].tolist() for layer in sites.layers}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("ties", [False, True])
def test_the_top_share_is_chosen(pattern: str, share: str, ties: bool) -> None:
    scores = {layer: torch.rand(96, generator=torch.Generator().manual_seed(layer)) for layer in (0, 2, 5)}
    if ties:
        scores = {layer: (part * 4).round() for layer, part in scores.items()}
    assert as_lists(choose(scores, pattern, Fraction(share))) == tops(scores, pattern, Fraction(share))


@pytest.mark.parametrize("share", SHARES)
def test_how_many_neurons_a_share_is(share: str) -> None:
    net = oracle_models.net()
    batches, preference = read(net)
    part = Fraction(share)
    for pattern, pool, pools in (("global", 3 * 48, 1), ("even", 48, 3), ("layer", 48, 1)):
        sites = locate(net, batches, preference, Targeting(pattern=pattern, share=share))
        assert sites.count == pools * max(1, math.ceil(part * pool))
        assert all(columns.dtype == torch.int64 for columns in sites.columns.values())
        assert all(columns.tolist() == sorted(set(columns.tolist())) for columns in sites.columns.values())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("layers", ["1", "2/3", "one"])
def test_locate_chooses_by_attribution_within_the_layers(pattern: str, layers: str) -> None:
    net = oracle_models.net("gpt2")
    batches, preference = read(net)
    kept = locate(net, batches, preference, Targeting(layers=layers)).layers
    scores = attributions(net, batches, preference, kept)
    found = locate(net, batches, preference, Targeting(layers, pattern, "1/16"))
    assert as_lists(found) == tops(scores, pattern, Fraction(1, 16))


def test_neurons_that_score_alike_are_chosen_from_the_first() -> None:
    scores = {0: torch.ones(64), 1: torch.ones(64)}
    assert as_lists(choose(scores, "global", Fraction(1, 16))) == {0: list(range(8))}
    assert as_lists(choose(scores, "even", Fraction(1, 16))) == {0: list(range(4)), 1: list(range(4))}
    assert as_lists(choose(scores, "layer", Fraction(1, 16))) == {0: list(range(4))}


def test_the_whole_most_responsible_layer() -> None:
    net = oracle_models.net()
    batches, preference = read(net)
    scores = attributions(net, batches, preference, range(3))
    best = max(scores, key=lambda layer: float(scores[layer].norm()))
    sites = locate(net, batches, preference, Targeting(pattern="layer"))
    assert as_lists(sites) == {best: list(range(48))}


def test_locating_leaves_no_hooks_and_no_changes() -> None:
    net = oracle_models.net()
    before = oracle_models.State.of(net)
    locate(net, *read(net), Targeting(layers="1/2", pattern="global", share="1/16"))
    assert before.changed(net) == []


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "share"), [("1", 1), ("1/256", Fraction(1, 256)), (" 0.25 ", Fraction(1, 4))])
def test_shares_are_read(text: str, share: Fraction) -> None:
    assert share_of(text, "share") == share


@pytest.mark.parametrize("text", ["", "a quarter", "1/0", "0", "-1/4", "1.01", "nan", "inf", "1/4/4"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="share .*expected a number above 0 and up to 1"):
        share_of(text, "share")
    net = oracle_models.net()
    for targeting in (Targeting(share=text), Targeting(layers=text)):
        with pytest.raises(UsageError, match="expected a number above 0 and up to 1"):
            locate(net, *read(net), targeting)


def test_an_unknown_pattern_is_refused() -> None:
    net = oracle_models.net()
    with pytest.raises(UsageError, match="unknown pattern 'evn'; known: global, even, layer"):
        locate(net, *read(net), Targeting(pattern="evn"))


def test_methods_offer_the_patterns_that_are_known() -> None:
    assert base.PATTERNS == PATTERNS
