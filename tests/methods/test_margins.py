"""Gradients of margins, kept as factors, against autograd on the dense weights."""

from __future__ import annotations

from collections.abc import Sequence

import oracle
import oracle_minkl
import oracle_models
import pytest
import torch
from oracle_models import FAILURES, LAYERS, State
from torch import Tensor

from lmrepair import Net
from lmrepair.failures.tokens import Tokens
from lmrepair.methods.maths import margins as module
from lmrepair.methods.maths.margins import Factors, Margins, read_margins
from lmrepair.model.batches import Batch, Preference, Sites
from lmrepair.model.net import settled

SITES = {
    "all": {layer: torch.arange(oracle_models.WIDTH) for layer in range(LAYERS)},
    "some": {0: torch.tensor([0, 7, 30]), 2: torch.tensor([5, 6])},
    "last": {2: torch.arange(oracle_models.WIDTH)},
    "one": {1: torch.tensor([11])},
}
AT_ONCE = {"one batch": 10_000, "two a batch": 50, "alone": 1}


@pytest.fixture(scope="module", params=oracle_models.KINDS)
def net(request: pytest.FixtureRequest) -> Net:
    return oracle_models.net(request.param, dtype=torch.float64)


def tokens_of(net: Net) -> list[Tokens]:
    """The failures, and a target that is what the net says, so that some positions are preferred."""
    found = net.tokenize(FAILURES)
    prompt = found[1].prompt
    return [*found, Tokens("right", prompt, tuple(oracle.greedy(net.model, prompt, 5)))]


@pytest.fixture(scope="module")
def wanted(net: Net) -> tuple[Tensor, list[list[Tensor]]]:
    """Margins and dense gradients of every target token of the failures."""
    return oracle_minkl.margins(net.model, oracle_models.pairs(tokens_of(net)))


def read(
    net: Net, columns: str = "all", at_once: int = 10_000, focus: Tensor | None = None, margin: float | None = None
) -> Margins:
    with settled(net.model):
        return read_margins(net, net.batches(tokens_of(net), at_once), Sites(SITES[columns]), focus, margin)


def dense(factors: Sequence[Factors], layer: int) -> dict[int, Tensor]:
    """Position → J = Σ_i z_i g_iᵀ [k, d], added up one position after another."""
    found = {}
    for item in factors:
        z, g = item.inputs[layer].double(), item.slopes[layer].double()
        for at, row in enumerate(item.rows.tolist()):
            found[row] = sum((torch.outer(a, b) for a, b in zip(z, g[at], strict=True)), torch.zeros(()))
    return found


@pytest.mark.parametrize("columns", SITES)
@pytest.mark.parametrize("at_once", AT_ONCE)
def test_the_factors_are_the_dense_gradients(
    net: Net, wanted: tuple[Tensor, list[list[Tensor]]], columns: str, at_once: str
) -> None:
    margins, gradients = wanted
    reading = read(net, columns, AT_ONCE[at_once])
    assert torch.allclose(-reading.preference.gap.double(), margins, atol=1e-5)
    assert not reading.done
    for layer, chosen in SITES[columns].items():
        found = dense(reading.factors, layer)
        assert sorted(found) == list(range(len(margins)))
        for row, j in found.items():
            expected = gradients[row][layer]
            assert float((j - expected[chosen]).abs().max()) < 1e-5 * float(expected.abs().max())


def test_the_last_layer_matters_at_the_positions_own_place_alone(net: Net) -> None:
    """So its gradients have rank one; those of lower layers reach back to the prompt."""
    for item in read(net).factors:
        length = item.inputs[0].shape[0]
        own = range(length - len(item.rows), length)
        for at, place in enumerate(own):
            others = torch.arange(length) != place
            assert bool(item.slopes[2][at, place].any())
            assert not bool(item.slopes[2][at, others].any())
            assert bool(item.slopes[0][at, : place - 1].any())


def test_a_later_position_does_not_matter(net: Net) -> None:
    for item in read(net).factors:
        length = item.inputs[0].shape[0]
        for at in range(len(item.rows)):
            place = length - len(item.rows) + at
            assert not any(bool(slopes[at, place + 1 :].any()) for slopes in item.slopes.values())


@pytest.mark.parametrize("margin", [0.0, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("at_once", AT_ONCE)
def test_open_is_what_is_not_preferred_by_more_than_the_margin(
    net: Net, wanted: tuple[Tensor, list[list[Tensor]]], margin: float, at_once: str
) -> None:
    margins, gradients = wanted
    reading = read(net, "some", AT_ONCE[at_once], margin=margin)
    open_rows = [row for row, value in enumerate(margins.tolist()) if not value > margin]
    assert open_rows
    assert margin or len(open_rows) < len(margins)
    found = dense(reading.factors, 2)
    assert sorted(found) == open_rows
    for row in open_rows:
        assert torch.allclose(found[row], gradients[row][2][SITES["some"][2]], atol=1e-5)


@pytest.mark.parametrize("at_once", AT_ONCE)
def test_the_focus_narrows_what_is_open(net: Net, wanted: tuple[Tensor, list[list[Tensor]]], at_once: str) -> None:
    margins, gradients = wanted
    focus = torch.arange(len(margins)) % 3 == 1
    kept = focus.clone()
    for margin in (None, 1.0):
        rows = [row for row, value in enumerate(margins.tolist()) if row % 3 == 1 and not (margin and value > margin)]
        reading = read(net, "all", AT_ONCE[at_once], focus, margin)
        found = dense(reading.factors, 1)
        assert sorted(found) == rows
        assert all(torch.allclose(found[row], gradients[row][1], atol=1e-4) for row in rows)
        assert len(reading.preference.gap) == len(margins)
    assert torch.equal(focus, kept)


def test_done_is_when_nothing_in_the_focus_is_open(net: Net, wanted: tuple[Tensor, list[list[Tensor]]]) -> None:
    margins, _ = wanted
    right = margins > 0
    least = float(margins[right].min())
    assert bool(right.any())
    assert not bool(right.all())
    reading = read(net, focus=right, margin=least / 2)
    assert reading.done
    assert reading.factors == ()
    assert not read(net, focus=right, margin=least + 0.1).done
    assert not read(net, focus=~right, margin=least / 2).done
    assert not read(net, focus=right).done  # without a margin, every position of the focus is read


@pytest.mark.parametrize("per_pass", [1, 2, 3])
def test_fewer_slopes_at_once_are_the_same_slopes(net: Net, per_pass: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read(net)
    longest_text = max(len(item.ids) for item in tokens_of(net))
    passes = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(k.get("grad_outputs")) or grad(*a, **k))
    monkeypatch.setattr(module, "SLOPES_AT_ONCE", per_pass * longest_text * net.hidden * LAYERS)
    parts = read(net)
    # On a CPU the failures are read one by one: a shorter one has room for more in a pass.
    seeds = [given for given in passes if given is not None]
    assert min(map(len, seeds)) <= per_pass
    assert len(seeds) > len(whole.factors)
    for one, other in zip(whole.factors, parts.factors, strict=True):
        assert torch.equal(one.rows, other.rows)
        for layer in range(LAYERS):
            assert torch.allclose(one.slopes[layer], other.slopes[layer], atol=1e-6)
            assert torch.equal(one.inputs[layer], other.inputs[layer])


def test_reading_leaves_no_trace(net: Net) -> None:
    before = State.of(net)
    reading = read(net, margin=1.0)
    assert not before.changed(net)
    for item in reading.factors:
        for kept in (*item.inputs.values(), *item.slopes.values()):
            assert not kept.requires_grad
            assert kept.dtype == torch.float32


@pytest.mark.parametrize("kind", oracle_models.KINDS)
def test_bfloat16_gives_nearly_the_same(kind: str) -> None:
    """Where a near tie does not make it another rival's margin."""
    net = oracle_models.net(kind, dtype=torch.bfloat16)
    tokens = net.tokenize(FAILURES)
    _, gradients = oracle_minkl.margins(net.model, oracle_models.pairs(tokens))
    rivals = []
    for item in tokens:
        for row, token in zip(oracle.logits(net.model, item.ids)[len(item.prompt) - 1 : -1], item.target, strict=True):
            row[token] = -torch.inf
            rivals.append(int(row.argmax()))
    with settled(net.model):
        reading = read_margins(net, net.batches(tokens), Sites(SITES["all"]), None, None)
    same = reading.preference.rival == torch.tensor(rivals)
    assert float(same.double().mean()) > 0.8
    for row, j in dense(reading.factors, 1).items():
        wanted = gradients[row][1]
        near = torch.nn.functional.cosine_similarity(j.flatten(), wanted.flatten(), dim=0)
        assert not same[row] or float(near) > 0.95


def test_the_last_layers_slopes_are_had_in_one_pass(net: Net) -> None:
    """The short way for the last layer alone gives what the general way gives for it among others."""
    last = LAYERS - 1
    alone = Sites({last: torch.arange(net.widths[last])})
    with settled(net.model):
        batches = net.batches(tokens_of(net))
        short = read_margins(net, batches, alone, None, 0.5).factors
        long = read_margins(net, batches, net.every_site(), None, 0.5).factors
    assert len(short) == len(long) > 1
    for one, other in zip(short, long, strict=True):
        assert torch.equal(one.rows, other.rows)
        assert torch.equal(one.inputs[last], other.inputs[last])
        assert torch.allclose(one.slopes[last], other.slopes[last], atol=1e-5 * float(other.slopes[last].abs().max()))


def test_a_caller_may_choose_what_is_open_and_what_is_read(net: Net) -> None:
    asked: list[slice] = []

    def choose(batch: Batch, preference: Preference, part: slice) -> tuple[Tensor, Tensor]:
        assert len(batch.rows) == len(preference.gap) == part.stop - part.start
        asked.append(part)
        read = torch.zeros(len(batch.rows), dtype=torch.bool)
        read[-1] = True
        return read & (len(asked) == opened), read

    for opened in (0, 2):
        asked.clear()
        with settled(net.model):
            batches = net.batches(tokens_of(net))
            made = read_margins(net, batches, Sites(SITES["all"]), None, 0.0, choose)
        assert made.done == (opened == 0)
        assert [part.start for part in asked] == [0, *(part.stop for part in asked[:-1])]
        assert asked[-1].stop == len(made.preference.gap)
        assert [row for item in made.factors for row in item.rows.tolist()] == [part.stop - 1 for part in asked]
        assert len(asked) == len(tokens_of(net)), "on a CPU, failures go through one by one"
