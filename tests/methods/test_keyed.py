"""Keys, values, and the methods that write at a prompt's last token: what they change is what they say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import oracle
import oracle_models
import pytest
import torch
from oracle_models import FAILURES, State

from lmrepair import AlphaEdit, Direct, Emmet, Memit, Method, Net, Rome, Star, UsageError, repair_each
from lmrepair.methods import method_named
from lmrepair.methods.keyed.keyed import Keyed
from lmrepair.methods.keyed.values import Search, Values, find_values, key_rows, read_keys
from lmrepair.methods.maths.closed_form import Constraints, inverse_metric
from lmrepair.model import LowRank
from lmrepair.model.batches import Batch
from lmrepair.model.net import settled
from lmrepair.model.statistics.moments import Metric, Statistics
from lmrepair.patch import Patch

SEARCH = Search(steps=15, rate=0.3, decay=0.01, clamp=4.0, essence=0.1, margin=1.0)
FAMILY: list[Keyed] = [Rome(), Emmet(), Memit(span="2/3"), AlphaEdit(threshold=0.3, span="2/3")]


def one_batch(net: Net, count: int = len(FAILURES)) -> Batch:
    (batch,) = net.batches(net.tokenize(FAILURES[:count]))
    return batch


def searched(net: Net, batch: Batch, layer: int, search: Search) -> Values:
    with settled(net.model):
        return find_values(net, batch, layer, search)


def statistics(net: Net, method: Method) -> Statistics:
    found = oracle_models.statistics(net, method)
    assert found is not None
    return found


@pytest.mark.parametrize("kind", oracle_models.KINDS)
def test_a_key_is_the_last_token_of_a_prompt(kind: str) -> None:
    net = oracle_models.net(kind)
    batch = one_batch(net)
    assert [batch.ids.reshape(-1)[row] for row in key_rows(batch)] == [item.prompt[-1] for item in batch.tokens]
    with settled(net.model):
        read = read_keys(net, batch, (0, 2), 1)
    for layer in (0, 2):
        first = [(item.prompt, item.target[:1]) for item in batch.tokens]
        wanted = oracle.coefficients(net.model, layer, first)
        assert float((read.keys[layer].double() - wanted).abs().max() / wanted.abs().max()) < 1e-4


@pytest.mark.parametrize("method", FAMILY, ids=lambda item: item.name)
def test_a_change_has_as_many_directions_as_there_were_keys(method: Keyed, tmp_path: Path) -> None:
    net = oracle_models.net()
    before = State.of(net)
    (made,) = repair_each(net, FAILURES[:1], dataclasses.replace(method, epochs=1), statistics=statistics(net, method))
    patch = made.patch
    assert patch is not None
    for change in patch.changes.values():
        assert isinstance(change, LowRank)
        assert change.product.rank == (2 if method.fine else 1)
    patch.save(tmp_path / "one.safetensors")
    Patch.load(tmp_path / "one.safetensors").apply(net)
    assert before.changed(net)
    patch.revert(net)
    assert not before.changed(net)


@pytest.mark.parametrize("kind", oracle_models.KINDS)
@pytest.mark.parametrize("layer", [0, 2])
def test_values_lower_the_objective_and_are_the_same_again(kind: str, layer: int) -> None:
    net = oracle_models.net(kind)
    before, random = State.of(net), torch.random.get_rng_state()
    batch = one_batch(net)
    found, again = searched(net, batch, layer, SEARCH), searched(net, batch, layer, SEARCH)
    assert bool((found.after < found.before).all())
    for spec in dataclasses.fields(found):
        assert torch.equal(getattr(found, spec.name), getattr(again, spec.name))
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not before.changed(net)


def test_the_objective_without_a_shift_is_the_targets_mean_cross_entropy() -> None:
    net = oracle_models.net()
    found = searched(net, one_batch(net), 1, SEARCH)
    for tokens, value in zip(net.tokenize(FAILURES), found.before.tolist(), strict=True):
        wanted = float(oracle.losses(net.model, [(tokens.prompt, tokens.target)]).mean())
        assert value == pytest.approx(wanted, rel=1e-4)


def test_each_value_is_searched_for_on_its_own() -> None:
    net = oracle_models.net()
    together = searched(net, one_batch(net), 1, SEARCH)
    alone = searched(net, one_batch(net, 1), 1, SEARCH)
    assert float((together.shifts[0] - alone.shifts[0]).abs().max() / alone.shifts.abs().max()) < 1e-2


def test_a_value_is_no_larger_than_the_clamp() -> None:
    net = oracle_models.net()
    batch = one_batch(net)
    tight = dataclasses.replace(SEARCH, clamp=0.2, margin=50.0)
    with settled(net.model):
        written = read_keys(net, batch, (), 1).outputs.norm(dim=1)
    sizes = searched(net, batch, 1, tight).shifts.norm(dim=1) / written
    assert float(sizes.max()) <= 0.2 * (1 + 1e-5)
    assert float(sizes.max()) > 0.1
    assert float((searched(net, batch, 1, SEARCH).shifts.norm(dim=1) / written).max()) > 0.2


def test_the_essence_keeps_what_follows_the_key_without_its_context() -> None:
    net = oracle_models.net()
    batch = one_batch(net)
    free, kept = (
        searched(net, batch, 0, dataclasses.replace(SEARCH, essence=essence, margin=50.0)).shifts
        for essence in (0.0, 100.0)
    )
    assert float(kept.norm()) < 0.9 * float(free.norm())


def test_what_is_preferred_already_is_left_as_it_is() -> None:
    net = oracle_models.net()
    (tokens,) = net.tokenize(FAILURES[:1])
    (made,) = net.generate([tokens])
    right = dataclasses.replace(tokens, target=made[:1])
    (batch,) = net.batches([right, net.tokenize(FAILURES[1:2])[0]])
    found = searched(net, batch, 1, dataclasses.replace(SEARCH, margin=0.0))
    assert not found.shifts[0].any()
    assert found.shifts[1].any()


@pytest.mark.parametrize("kind", oracle_models.KINDS)
def test_a_step_of_emmet_writes_every_value_at_its_key(kind: str) -> None:
    net = oracle_models.net(kind)
    batch = one_batch(net)
    inverse = Metric.of(statistics(net, Emmet()), 0.01).inputs[1]
    with settled(net.model):
        keys = read_keys(net, batch, (1,), 1).keys[1]
        shifts = find_values(net, batch, 1, SEARCH).shifts
    change = Constraints.of({1: keys}, {1: inverse_metric(inverse)}).solve(shifts)[1]
    assert float((keys @ change - shifts).abs().max() / shifts.abs().max()) < 1e-3


@pytest.mark.parametrize("kind", oracle_models.KINDS)
@pytest.mark.parametrize("method", [*FAMILY, Direct(span="2/3")], ids=lambda method: method.name)
def test_a_method_writes_where_it_says_and_reports_what_it_finds(kind: str, method: Method) -> None:
    """Multi-token targets may stay mistaken; the patch must do exactly what the outcome says all the same."""
    net = oracle_models.net(kind)
    before = State.of(net)
    method = dataclasses.replace(method, epochs=2, **({"values": 8} if isinstance(method, Keyed) else {}))
    known = statistics(net, method)
    (result,), (again,) = (list(repair_each(net, FAILURES[:1], method, statistics=known)) for _ in range(2))
    assert not before.changed(net)
    assert result.patch is not None
    assert again.patch is not None
    layers = {"rome": [1], "emmet": [1], "memit": [0, 1], "alphaedit": [0, 1], "direct": [1, 2]}[method.name]
    assert sorted(result.patch.changes) == layers
    for layer, change in result.patch.changes.items():
        assert torch.equal(change.deltas, again.patch.changes[layer].deltas)
    tokens = result.outcomes[0].tokens
    with result.patch.on(net):
        wrong = [found[:3] for found in oracle.mistakes(net.model, tokens.prompt, tokens.target)]
    assert [(m.position, m.wanted, m.said) for m in result.outcomes[0].after] == wrong


def test_alphaedit_leaves_the_sampled_coefficients_alone() -> None:
    net = oracle_models.net()
    method = AlphaEdit(samples=20, threshold=1e-6, epochs=1, span="1/3")
    known = statistics(net, method)
    (result,) = repair_each(net, FAILURES[:1], method, statistics=known)
    assert result.patch is not None
    change = result.patch.changes[1]
    delta = torch.zeros(net.widths[1], net.hidden).index_copy(0, change.columns, change.deltas)
    assert float((known.inputs[1].values @ delta).abs().max()) < 1e-4 * float(delta.abs().max())


def test_a_step_of_star_in_a_metric_is_the_oracles() -> None:
    net = oracle_models.net()
    for kind in ("diagonal", "sampled", "full"):
        method = Star(metric=kind, share="1", epochs=1, early=False, samples=32, learning_rate=0.03, gain=False)
        known = statistics(net, method)
        (result,) = repair_each(net, FAILURES[:1], method, statistics=known)
        assert result.patch is not None
        (tokens,) = net.tokenize(FAILURES[:1])
        pair = (tokens.prompt, tokens.target)
        steers = torch.zeros(len(tokens.target), net.hidden, dtype=torch.float64)
        for position, wanted, said, _ in oracle.mistakes(net.model, *pair):
            steers[position] = oracle.by_spread(oracle.steers(net.model.lm_head.weight, [wanted], [said]))[0]
        gradients = oracle.gradients(net.model, [pair])
        for layer, change in result.patch.changes.items():
            values = known.inputs[layer].values.double()
            c = torch.diag(values) if kind == "diagonal" else values
            c = values.T @ values / len(values) if kind == "sampled" else c
            c = c + 0.01 * c.diagonal().mean() * torch.eye(len(c), dtype=torch.float64)
            prior = oracle.closed_form(oracle.coefficients(net.model, layer, [pair]), steers, torch.linalg.inv(c))
            sizes = 0.03 * prior[change.columns].abs()
            clear = gradients[layer][change.columns].abs() > 1e-4 * gradients[layer].abs().max()
            assert float((change.deltas.double().abs() - sizes)[clear].abs().max() / sizes.max()) < 5e-3


def test_settings_out_of_range_are_refused() -> None:
    for name, settings, said in (
        ("rome", {"depth": 1.5}, "depth is 1.5"),
        ("rome", {"mode": "multi-failure"}, "known: batch"),
        ("emmet", {"ridge": 0.0}, "above 0"),
        ("memit", {"decay": -1.0}, "decay is -1.0"),
        ("alphaedit", {"inputs": "diagonal"}, "inputs 'diagonal' is unknown"),
        ("star", {"metric": "none"}, "metric 'none' is unknown"),
        ("memit", {"span": "2"}, "span '2' is out of range"),
        ("direct", {"span": "all"}, "span 'all' is no share"),
    ):
        with pytest.raises(UsageError, match=said):
            method_named(name, None, **settings)  # type: ignore[arg-type]
