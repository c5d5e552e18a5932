"""MINT against the oracle, patch by patch; what it does not solve is as it was, bit for bit."""

from __future__ import annotations

from typing import Any

import oracle
import oracle_models
import pytest
import torch
from oracle_models import FAILURES, LAYERS, TEXT, WIDTH, State

from lmrepair import Failure, Mint, ModelError, Net, repair, repair_each
from lmrepair.methods.base import Problem, Step
from lmrepair.methods.maths.basis import Bases
from lmrepair.model.edit import Trial
from lmrepair.model.net import settled

UPPER = range(LAYERS // 2, LAYERS)


def first_mistake(net: Net, failure: Failure) -> int:
    tokens = net.tokenize([failure])[0]
    return int(oracle.mistakes(net.model, tokens.prompt, tokens.target)[0][0])


def patches(net: Net, method: Mint, count: int, position: int, memory: Any = None) -> list[Step]:
    """The method's first steps on one mistake of the first failure, the weights put back afterwards."""
    batches = tuple(net.batches(net.tokenize(FAILURES[:1])))
    focus = torch.arange(len(batches[0].rows)) == position
    found: list[Step] = []
    with settled(net.model):
        sites = method.sites(net, batches, net.prefer(batches))
        deltas = {layer: torch.zeros(len(columns), net.hidden) for layer, columns in sites.columns.items()}
        with Trial(net, sites) as trial:
            for step in range(count):
                reading = method.read(net, batches, sites, focus, None)
                given = Problem(net, batches, sites, reading, focus, deltas, Bases.of(net), step, memory)
                found.append(method.solve(given))
                deltas, memory = dict(found[-1].deltas), found[-1].memory
                trial.write(deltas)
    return found


@pytest.mark.parametrize("kind", oracle_models.KINDS)
@pytest.mark.parametrize("variant", ["delta", "basis"])
@pytest.mark.parametrize("factor", [0.01, 0.3])
def test_mint_is_the_oracles_patch_by_patch(kind: str, variant: str, factor: float) -> None:
    net = oracle_models.net(kind, dtype=torch.float64)
    position = first_mistake(net, FAILURES[0])
    tokens = net.tokenize(FAILURES[:1])[0]
    wanted = oracle.mint_steps(net.model, tokens.prompt, tokens.target, position, factor, 4, variant)
    found = patches(net, Mint(factor=factor, variant=variant), 4, position)
    before: dict[int, torch.Tensor] = {layer: torch.zeros(WIDTH, net.hidden) for layer in range(LAYERS)}
    for step, (candidates, winner, _, changes) in zip(found, wanted, strict=True):
        assert list(step.memory.candidates) == candidates
        moved = [
            (layer, neuron)
            for layer, delta in step.deltas.items()
            for neuron in (delta - before[layer]).any(dim=1).nonzero().squeeze(1).tolist()
        ]
        assert moved == [winner]
        for layer in UPPER:
            scale = float(changes[layer].abs().max()) or 1.0
            assert float((step.deltas[layer] - changes[layer]).abs().max()) < 1e-5 * scale
            before[layer] = step.deltas[layer]
    assert [layer for layer in range(LAYERS) if layer not in found[0].deltas] == list(range(LAYERS // 2))


@pytest.mark.parametrize("variant", ["delta", "basis"])
def test_drifts_orthogonal_to_the_ones_used_before(variant: str) -> None:
    net = oracle_models.net(dtype=torch.float64)
    tokens = net.tokenize(FAILURES[:1])[0]
    one, other, *_ = [position for position, *_ in oracle.mistakes(net.model, tokens.prompt, tokens.target)]
    method = Mint(factor=0.2, variant=variant, orthogonal=True)
    first = patches(net, method, 2, one)
    used = list(first[-1].memory.used)
    assert len(used) >= 1
    wanted = oracle.mint_steps(net.model, tokens.prompt, tokens.target, other, 0.2, 2, variant, used)
    found = patches(net, method, 2, other, first[-1].memory)
    plain = patches(net, Mint(factor=0.2, variant=variant), 2, other)
    for step, without, (_, _, _, changes) in zip(found, plain, wanted, strict=True):
        for layer in UPPER:
            assert float((step.deltas[layer] - changes[layer]).abs().max()) < 1e-5
        assert any(float((step.deltas[layer] - without.deltas[layer]).abs().max()) > 1e-4 for layer in UPPER)


def test_a_drift_that_earlier_ones_span_is_none() -> None:
    """The same mistake again: nothing of its drift is left, and a patched neuron only shrinks."""
    net = oracle_models.net()
    position = first_mistake(net, FAILURES[0])
    method = Mint(factor=0.5, orthogonal=True)
    (first,) = patches(net, method, 1, position)
    (again,) = patches(net, method, 1, position, first.memory)
    (place,) = [
        (layer, neuron)
        for layer, delta in again.deltas.items()
        for neuron in delta.any(dim=1).nonzero().squeeze(1).tolist()
    ]
    weight = net.columns(place[0])[place[1]]
    torch.testing.assert_close(again.deltas[place[0]][place[1]], weight / 1.5 - weight)


def test_candidates_by_activation_and_at_random() -> None:
    net = oracle_models.net()
    position = first_mistake(net, FAILURES[0])
    tokens = net.tokenize(FAILURES[:1])
    sizes = {
        (layer, neuron): abs(float(value))
        for layer in UPPER
        for neuron, value in enumerate(oracle.coefficients(net.model, layer, oracle_models.pairs(tokens))[position])
    }
    (step,) = patches(net, Mint(rank_by="activation"), 1, position)
    assert list(step.memory.candidates) == sorted(sizes, key=lambda place: -sizes[place])[:10]
    drawn = [patches(net, Mint(rank_by="random", seed=seed), 1, position)[0].memory.candidates for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 10
    assert set(drawn[0]) <= set(sizes)


@pytest.mark.parametrize("kind", oracle_models.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mint_that_fails_leaves_every_weight_as_it_was(kind: str, dtype: torch.dtype) -> None:
    net = oracle_models.net(kind, dtype=dtype)
    for layer in range(net.layers):
        net.columns(layer)[::3, ::5] = -0.0  # a sum with 0 would not keep its sign
    before = State.of(net)
    starts, between = [], []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "steps":
            (between if done else starts).append([name for name in before.changed(net) if name.endswith("weight")])

    result = repair(net, FAILURES[1:2], Mint(factor=1e-3, epochs=2), TEXT, progress)
    (outcome,) = result.outcomes
    assert (result.repaired, result.patch) == (0, None)
    # Every mistake was tried, and each from the untouched weights.
    assert len(starts) == len(outcome.before) > 1
    assert not any(starts)
    assert all(between)
    assert outcome.after == outcome.before
    assert "after 2 epochs for each, which were undone; try a larger factor" in outcome.reason
    assert not before.changed(net)
    (alone,) = repair_each(net, FAILURES[1:2], Mint(factor=1e-3, epochs=2))
    assert alone.patch is None


def test_what_is_solved_stays_where_another_mistake_is_not() -> None:
    """With few patches for each, some mistakes are solved and some undone: the patch is that of the solved."""
    net = oracle_models.net()
    before = State.of(net)
    (result,) = repair_each(net, FAILURES[3:4], Mint(factor=1.0, rounds=1))
    (outcome,) = result.outcomes
    assert 0 < len(outcome.after) < len(outcome.before)
    assert result.patch is not None
    assert not before.changed(net)
    assert set(result.patch.changes) <= set(UPPER)
    assert result.patch.neurons < result.cost.steps


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_breaks_a_trial_leaves_the_net_as_it_was(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = oracle_models.net()
    before = State.of(net)
    kept, seen = net.logits, []

    def logits(*arguments: Any) -> Any:
        seen.append([name for name in before.changed(net) if name.endswith("weight")])
        if len(seen) == 17:
            raise error
        return kept(*arguments)

    monkeypatch.setattr(net, "logits", logits)
    with pytest.raises(error):
        repair(net, FAILURES[:1], Mint(factor=0.3), TEXT)
    assert seen[-1]
    assert not before.changed(net)


def test_rounds_end_where_nothing_more_would_change() -> None:
    net = oracle_models.net()
    (one,) = repair_each(net, FAILURES[:1], Mint(factor=1e-3, epochs=2))
    (ten,) = repair_each(net, FAILURES[:1], Mint(factor=1e-3, epochs=2, rounds=10))
    assert one.cost.steps == ten.cost.steps == 2 * len(one.outcomes[0].before)


def test_embeddings_of_another_width_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    net = oracle_models.net()
    position = first_mistake(net, FAILURES[0])

    class Narrow(torch.nn.Embedding):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().forward(tokens)[:, : oracle_models.HIDDEN // 2]

    table = Narrow(net.anatomy.vocabulary, net.hidden)
    monkeypatch.setattr(net.model, "get_input_embeddings", lambda: table)
    with pytest.raises(ModelError, match="are 16 wide, the states 32.*use --variant delta"):
        patches(net, Mint(variant="basis"), 1, position)
