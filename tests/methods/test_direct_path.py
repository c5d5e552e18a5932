"""From an FFN to the margins along the direct path, and through the norm behind an FFN where a model has one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lmrepair.loop import repair_each
from lmrepair.methods import AlphaEdit, Direct, Memit, Method, method_named
from lmrepair.methods.maths import contrasting, read_slopes
from lmrepair.model import Net
from tests import oracle_models

FAILURES = oracle_models.FAILURES[:3]


def added_to_the_stream(net: Net, ids: Tensor) -> list[Tensor]:
    """What each block of a Gemma 3 adds behind its FFN, in one pass: Gemma's own norm writes it."""
    made: list[Tensor] = []
    handles = [
        block.post_feedforward_layernorm.register_forward_hook(lambda _, __, output: made.append(output.detach()))
        for block in net.model.model.layers
    ]
    with torch.no_grad():
        net.model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return made


def test_coefficients_and_units_make_what_the_norm_hands_on() -> None:
    net = oracle_models.net("gemma3", dtype=torch.float64)
    (batch,) = net.batches(net.tokenize(FAILURES[:1]))
    reading = read_slopes(net, [batch], net.every_site(), None, None)
    for layer, whole in enumerate(added_to_the_stream(net, batch.ids)):
        made = reading.coefficients[layer].double() @ net.columns(layer).double() * reading.units[layer]
        wanted = whole.reshape(-1, net.hidden)[batch.rows]
        assert float((made - wanted).norm()) < 1e-4 * float(wanted.norm())


def test_slopes_are_by_what_the_last_ffn_adds() -> None:
    """Against differences of margins with something small put into the stream behind the last norm (Gemma's own
    norms work in 32 bits whatever the model does)."""
    net = oracle_models.net("gemma3", dtype=torch.float64)
    (batch,) = net.batches(net.tokenize(FAILURES[:1]))
    reading = read_slopes(net, [batch], net.every_site(), None, None)
    wanted, rival = batch.wanted[:, None], reading.preference.rival[:, None]
    direction = torch.randn(net.hidden, dtype=torch.float64, generator=torch.manual_seed(0))

    def margins(size: float) -> Tensor:
        norm = net.model.model.layers[-1].post_feedforward_layernorm
        handle = norm.register_forward_hook(lambda _, __, output: output + size * direction)
        with torch.no_grad():
            logits = net.model(input_ids=batch.ids).logits[0][batch.rows]
        handle.remove()
        return (logits.gather(1, wanted) - logits.gather(1, rival)).squeeze(1)

    found = reading.slopes.double() @ direction
    assert torch.allclose(found, (margins(1e-2) - margins(-1e-2)) / 2e-2, rtol=1e-2, atol=1e-3)


def test_without_a_norm_behind_the_ffns_nothing_is_scaled() -> None:
    net = oracle_models.net("llama")
    reading = read_slopes(net, net.batches(net.tokenize(FAILURES)), net.every_site(), None, None)
    assert not reading.units


@pytest.mark.parametrize(
    "method",
    [
        method_named("direct", "astra", epochs=3),
        Direct(epochs=3, span="1"),
        Memit(epochs=2, span="2/3"),
        AlphaEdit(epochs=2, span="2/3", threshold=0.5),
    ],
    ids=["astra", "direct", "memit", "alphaedit"],
)
def test_it_does_not_matter_how_large_an_output_is_in_front_of_its_norm(method: Method) -> None:
    """The norm takes the size away again: the same change, in that size, of the same layers."""
    gains = [64.0, 4.0, 0.25]
    nets = oracle_models.net("gemma3"), Net(_grown(gains), oracle_models.tokenizer())
    results = [next(repair_each(net, FAILURES[2:3], method)) for net in nets]
    assert results[0].cost.steps == results[1].cost.steps > 0
    assert results[0].repaired == results[1].repaired
    plain, grown = (result.patch for result in results)
    assert plain is not None
    assert grown is not None
    assert set(plain.changes) == set(grown.changes)
    for layer, change in plain.changes.items():
        other = grown.changes[layer].deltas / gains[layer]
        assert float((other - change.deltas).norm()) < 2e-2 * float(change.deltas.norm())


def test_the_layers_of_the_contrast_are_those_that_write_it_to_the_stream() -> None:
    plain, grown = oracle_models.net("gemma3"), Net(_grown([64.0, 4.0, 0.25]), oracle_models.tokenizer())
    found = []
    for net in (plain, grown):
        reading = read_slopes(net, net.batches(net.tokenize(FAILURES)), net.every_site(), None, None)
        found.append(contrasting(net, reading, reading.preference.gap > -1.0, 2, 4).columns)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(columns, found[1][layer]) for layer, columns in found[0].items())


def _grown(gains: list[float]) -> Any:
    model = oracle_models.model("gemma3")
    with torch.no_grad():
        for block, gain in zip(model.model.layers, gains, strict=True):
            block.mlp.down_proj.weight.mul_(gain)
    return model
