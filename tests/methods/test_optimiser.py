"""The length of a step: what is asked of it holds, and it does not depend on the scale of weights, states or norms."""

from __future__ import annotations

import math
from typing import Any

import oracle_models
import pytest
import torch
from oracle_models import FAILURES
from torch import Tensor

from lmrepair import FineTune, Lora, Method, Net, Sgd, Star, repair_each
from lmrepair.methods.maths.optimiser import Way, adam, again, go, steepest, stride_after, units
from lmrepair.model.batches import Sites


def test_adam_goes_as_torchs_own() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(3, 4, dtype=torch.float64, generator=generator) for name in ("a", "b")}
    theirs = {name: one.clone().requires_grad_() for name, one in weights.items()}
    optimiser, moments = torch.optim.Adam(theirs.values(), lr=0.03), None
    for _ in range(4):
        gradients = {name: torch.randn(3, 4, dtype=torch.float64, generator=generator) for name in weights}
        for name, gradient in gradients.items():
            theirs[name].grad = gradient.clone()
        optimiser.step()
        moves, moments = adam(gradients, moments, 0.03)
        weights = {name: one + moves[name] for name, one in weights.items()}
        for name, one in weights.items():
            assert torch.allclose(one, theirs[name], rtol=0, atol=1e-12)
    assert moments is not None
    assert moments.steps == 4


def way(slope: float, loss: float = 2.0, kl: float = 0.25) -> Way:
    return Way(lambda length: {0: torch.tensor([length], dtype=torch.float64)}, slope, loss, kl)


def bowl(curvature: float, start: float = 0.25) -> object:
    return lambda deltas: start + curvature * float(deltas[0]) ** 2


def test_a_step_within_the_region_takes_its_share_of_the_loss() -> None:
    found = go(way(slope=4.0), lambda _: 0.25, descent=0.5, stride=0.01)
    assert found.length == 0.5 * 2.0 / 4.0
    assert found.end[0].item() == found.length
    assert found.reached == 0.25


@pytest.mark.parametrize("curvature", [0.1, 3.0, 1e6])
def test_a_step_ends_inside_the_region_and_not_far_inside(curvature: float) -> None:
    allowed = 0.01
    found = go(way(slope=0.1), bowl(curvature), descent=0.5, stride=allowed)  # type: ignore[arg-type]
    risen = curvature * found.length**2
    assert risen <= allowed
    assert risen >= 0.2 * allowed or found.length == 0.5 * 2.0 / 0.1


def test_strides_shorten_as_they_add_up() -> None:
    assert stride_after(0.0, 0.01) == 0.01
    assert stride_after(0.02, 0.01) == pytest.approx(0.005)
    assert stride_after(0.0, 0.5) == 0.5
    spent = 0.0
    for _ in range(5):
        spent += stride_after(spent, 0.01)
    assert spent < 0.032  # five whole ones would be 0.05
    assert stride_after(math.inf, 0.01) == stride_after(1.0, 0.01) == pytest.approx(0.01 / 3)


def test_a_probe_that_is_no_number_shortens_the_step() -> None:
    found = go(way(slope=1.0), lambda deltas: math.inf if float(deltas[0]) > 0.1 else 0.25, 0.5, 0.01)
    assert 0 < found.length <= 0.1


def test_the_same_way_is_gone_a_quarter_as_far() -> None:
    first = go(way(slope=4.0), lambda _: 0.25, 0.5, 0.01)
    assert again(first, lambda _: 0.25, 0.01).length == first.length / 4


def test_where_nothing_leads_down_nothing_moves() -> None:
    start = {0: torch.zeros(2, 3)}
    up = {0: torch.ones(2, 3)}
    at, slope = steepest(start, up, up, {0: 1.0})
    assert slope == 0
    assert torch.equal(at(5.0)[0], start[0])


def test_the_mixture_of_layers_is_the_steepest() -> None:
    """Against all weights on the unit sphere, in float64: no other mixture of the sized moves falls as fast."""
    generator = torch.Generator().manual_seed(1)
    moves = {layer: torch.randn(5, 4, generator=generator, dtype=torch.float64) * 10.0**layer for layer in range(3)}
    gradients = {layer: -move.sign() * (1 + layer) for layer, move in moves.items()}
    sizes = {0: 0.5, 1: 2.0, 2: 0.1}
    start = {layer: torch.zeros(5, 4, dtype=torch.float64) for layer in moves}
    at, slope = steepest(start, moves, gradients, sizes)
    sized = {layer: move / move.square().mean().sqrt() * sizes[layer] for layer, move in moves.items()}
    found = at(1.0)
    weights = torch.stack([(found[layer] * sized[layer]).sum() / sized[layer].square().sum() for layer in sized])
    falls = torch.stack([-(gradients[layer] * sized[layer]).sum() for layer in sized])
    assert slope == pytest.approx(float(weights @ falls))
    best = float(weights @ falls / weights.norm())
    others = torch.randn(2000, 3, generator=generator, dtype=torch.float64)
    assert float((others / others.norm(dim=1, keepdim=True) @ falls).max()) <= best * (1 + 1e-9)


def test_units_are_of_the_chosen_neurons() -> None:
    net = oracle_models.net("gpt2")
    chosen = torch.tensor([1, 4])
    wanted = float(net.columns(1)[chosen].double().square().mean().sqrt())
    assert units(net, Sites({1: chosen}))[1] == pytest.approx(wanted, rel=1e-6)


DEFAULTS: list[Method] = [Star(), FineTune(), Sgd(early=True, epochs=20), Lora()]


@pytest.mark.parametrize("method", DEFAULTS, ids=lambda method: method.name)
def test_the_defaults_do_not_know_how_large_a_models_numbers_are(method: Method) -> None:
    """One function, written with other numbers: gains moved between matrices that follow each other."""
    gains = [0.25, 1.0, 16.0]
    plain, scaled = oracle_models.net("llama"), Net(_rescaled(gains), oracle_models.tokenizer())
    failures = FAILURES[2:3]
    ids = torch.tensor([[1, 5, 9, 20]])
    with torch.inference_mode():
        assert torch.allclose(plain.model(ids).logits, scaled.model(ids).logits, atol=1e-4)
    results = [next(repair_each(net, failures, method)) for net in (plain, scaled)]
    assert results[0].cost.steps == results[1].cost.steps > 0
    assert results[0].repaired == results[1].repaired
    assert results[0].patch is not None
    assert results[1].patch is not None
    for layer, change in results[0].patch.changes.items():
        other: Tensor = results[1].patch.changes[layer].deltas * gains[layer]
        assert float((other - change.deltas).norm()) < 1e-3 * float(change.deltas.norm())


@pytest.mark.parametrize("metric", ["diagonal", "identity"])
def test_stars_prior_does_not_know_how_large_a_neuron_is(metric: str) -> None:
    """Each neuron of a layer written c times as large, with its column c times as small; the published prior knows."""
    c = torch.logspace(-1, 1, oracle_models.WIDTH)[torch.randperm(oracle_models.WIDTH, generator=torch.manual_seed(0))]
    model = oracle_models.model("llama")
    with torch.no_grad():
        model.model.layers[-1].mlp.up_proj.weight.mul_(c[:, None])
        model.model.layers[-1].mlp.down_proj.weight.div_(c)
    method = Star(metric=metric, damping=1e-7, layers="last", share="1")
    nets = oracle_models.net("llama"), Net(model, oracle_models.tokenizer())
    plain, scaled = (next(repair_each(net, oracle_models.FAILURES[2:3], method)).patch for net in nets)
    assert plain is not None
    assert scaled is not None
    change, other = plain.changes[2].deltas, scaled.changes[2].deltas * c[:, None]
    assert (float((other - change).norm()) < 1e-2 * float(change.norm())) == (metric == "diagonal")


def _rescaled(gains: list[float]) -> Any:
    """What the FFN's second matrix writes is made by the first two; what the head reads, by the norm before it."""
    model = oracle_models.model("llama")
    with torch.no_grad():
        for block, gain in zip(model.model.layers, gains, strict=True):
            block.mlp.up_proj.weight.mul_(gain)
            block.mlp.down_proj.weight.div_(gain)
        model.model.norm.weight.mul_(8.0)
        model.lm_head.weight.div_(8.0)
    return model
