"""Mixtures of experts of many families: where their neurons are, coefficients, gradients, repairs, reverts."""

from __future__ import annotations

import mixtures
import oracle_models
import pytest
import torch
from mixtures import FAMILIES
from oracle_models import FAILURES, TEXT, State
from torch import Tensor

from lmrepair import MinKl, repair
from lmrepair.methods import Method
from lmrepair.model.batches import Batch
from lmrepair.model.net import Net, settled
from lmrepair.model.statistics import gather


def by_autograd(net: Net, family: str) -> tuple[Batch, dict[str, Tensor]]:
    """Parameter → the gradient of the mean cross-entropy, as autograd gives it; and what was read."""
    (batch,) = net.batches(net.tokenize(FAILURES))
    names = [name for layer in range(net.layers) for name in mixtures.parameters(family, layer)]
    wanted = [net.model.get_parameter(name).requires_grad_() for name in names]
    with torch.enable_grad():
        output = net.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
        logits = output.logits.reshape(-1, output.logits.shape[-1])[batch.rows]
        loss = torch.nn.functional.cross_entropy(logits, batch.wanted)
        made = dict(zip(names, torch.autograd.grad(loss, wanted), strict=True))
    net.model.requires_grad_(False)
    return batch, made


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_weights(family: str) -> None:
    net = mixtures.net(family, dtype=torch.float64)
    before = State.of(net)
    batch, made = by_autograd(net, family)
    with settled(net.model):
        reading = net.read([batch], net.every_site())
    assert not before.changed(net)
    for layer in range(net.layers):
        names = mixtures.parameters(family, layer)
        wanted = torch.cat([mixtures.neuron_major(made[name]) for name in names])
        weights = torch.cat([mixtures.neuron_major(net.model.get_parameter(name).detach()) for name in names])
        assert torch.equal(net.columns(layer), weights)
        assert wanted.abs().max() > 0
        near = 1e-6 * float(wanted.abs().max())
        assert torch.allclose(reading.gradients[layer].double(), wanted, rtol=1e-4, atol=near)


@pytest.mark.parametrize("method", [oracle_models.bold_star(), MinKl()], ids=["star", "minkl"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_repair_holds_and_is_taken_back_bit_for_bit(family: str, method: Method) -> None:
    net = mixtures.net(family, seed=int(family == "llama4"))
    before = State.of(net)
    asked = method.asks()
    known = gather(net, net.sample(2, 24), asked, "test") if asked else None
    found = repair(net, FAILURES[2:3], method, TEXT, statistics=known)
    assert found.repaired == 1, found.outcomes[0].reason
    assert found.patch is not None
    assert found.drift
    (tokens,) = [item.tokens for item in found.patch.items]
    assert net.generate([tokens]) == [tokens.target]
    assert before.changed(net)
    found.patch.revert(net)
    assert not before.changed(net)
