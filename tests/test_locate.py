"""Where to write: skipped layers, attributions, patterns and shares."""

from __future__ import annotations

from fractions import Fraction

import oracle
import oracle_models
import pytest
import torch
from oracle_models import FAILURES

from lmrepair import Net, UsageError
from lmrepair.diagnosis import diagnoses
from lmrepair.locate import Targeting, attributions, choose, locate, share_of, skipped_losses
from lmrepair.net import settled


@pytest.fixture(scope="module", params=oracle_models.KINDS)
def net(request: pytest.FixtureRequest) -> Net:
    return oracle_models.net(request.param)


@pytest.mark.parametrize("at_once", [10_000, 30])
def test_skipped_losses(net: Net, at_once: int) -> None:
    batches = net.batches(net.tokenize(FAILURES), at_once)
    preference = net.prefer(batches)
    found = skipped_losses(net, batches, preference)
    wrong = [item for item in diagnoses(batches, preference) if item.mistakes]
    for layer in range(net.layers):
        each = [
            oracle.skipped_loss(net.model, layer, d.tokens.prompt, d.tokens.target, d.mistakes[0].position)
            for d in wrong
        ]
        assert float(found[layer]) == pytest.approx(sum(each) / len(each), rel=1e-4)


@pytest.mark.parametrize("by", ["probability", "contrast"])
@pytest.mark.parametrize("at_once", [10_000, 30])
def test_attributions(net: Net, by: str, at_once: int) -> None:
    batches = net.batches(net.tokenize(FAILURES), at_once)
    with settled(net.model):
        preference = net.prefer(batches)
        found = attributions(net, batches, preference, range(net.layers), by)
    for layer in range(net.layers):
        squares = torch.zeros(oracle_models.WIDTH, dtype=torch.float64)
        for item in diagnoses(batches, preference):
            wrong = [(m.position, m.said) for m in item.mistakes]
            if wrong:
                rows = oracle.gradient_times_activation(
                    net.model, layer, item.tokens.prompt, item.tokens.target, wrong, by
                )
                squares += rows.square().sum(0)
        wanted = squares.sqrt()
        assert torch.allclose(found[layer], wanted, rtol=1e-3, atol=1e-4 * float(wanted.max()))


def test_attributions_agree_with_captum(net: Net) -> None:
    from captum.attr import LayerGradientXActivation

    (batch,) = net.batches(net.tokenize(FAILURES[:1]))
    with settled(net.model):
        preference = net.prefer([batch])
        found = attributions(net, [batch], preference, [1])[1]
        wrong = ~(preference.gap < 0)

        def value(ids: torch.Tensor) -> torch.Tensor:
            logits = net.model(input_ids=ids).logits.reshape(-1, net.anatomy.vocabulary)[batch.rows[wrong]]
            return logits.softmax(1).gather(1, batch.wanted[wrong][:, None]).sum()[None]

        net.model.requires_grad_(True)
        explainer = LayerGradientXActivation(value, net.anatomy.projections[1])
        made = explainer.attribute(batch.ids, attribute_to_layer_input=True)
        net.model.requires_grad_(False)
    wanted = made.detach().reshape(-1, oracle_models.WIDTH)[batch.rows[wrong]].norm(dim=0)
    assert torch.allclose(found.float(), wanted, rtol=1e-3, atol=1e-5 * float(wanted.max()))


@pytest.mark.parametrize(("layers", "count"), [("one", 1), ("1/4", 1), ("1/2", 2), ("3/4", 3), ("1", 3)])
def test_the_layers_that_hurt_most_are_kept(net: Net, layers: str, count: int) -> None:
    batches = net.batches(net.tokenize(FAILURES))
    preference = net.prefer(batches)
    sites = locate(net, batches, preference, Targeting(layers=layers))
    ranked = skipped_losses(net, batches, preference).argsort(descending=True).tolist()
    assert sites.layers == tuple(sorted(ranked[:count]))
    assert all(len(columns) == oracle_models.WIDTH for columns in sites.columns.values())


@pytest.mark.parametrize("share", ["1", "1/4", "1/16", "1/64", "1/256"])
@pytest.mark.parametrize("pattern", ["global", "even", "layer"])
def test_patterns_and_shares(pattern: str, share: str) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {layer: torch.rand(512, generator=generator) * (layer + 1) for layer in (0, 2, 5)}
    part = Fraction(share)
    found = choose(scores, pattern, part).columns
    if pattern == "global":
        flat = torch.cat(list(scores.values()))
        best = flat.sort(descending=True).values[: -(-512 * 3 * part.numerator // part.denominator)]
        assert sum(map(len, found.values())) == len(best)
        assert min(float(scores[layer][columns].min()) for layer, columns in found.items()) == float(best[-1])
    else:
        assert set(found) == ({5} if pattern == "layer" else {0, 2, 5})
        for layer, columns in found.items():
            count = -(-512 * part.numerator // part.denominator)
            wanted = scores[layer].sort(descending=True).indices[:count].sort().values
            assert torch.equal(columns, wanted)


def test_ties_and_tiny_shares() -> None:
    even = choose({0: torch.zeros(8), 1: torch.zeros(8)}, "even", Fraction(1, 256)).columns
    assert {layer: columns.tolist() for layer, columns in even.items()} == {0: [0], 1: [0]}
    for bad in ("0", "2", "-1/4", "many", "1/0"):
        with pytest.raises(UsageError, match="share"):
            share_of(bad, "share")
