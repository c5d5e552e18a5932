"""Forecasts against what happens, and the first bad patch against a list that is looked through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import oracle_models
import pytest
import torch
from factored import factored
from oracle_models import FAILURES, State, bold_star

from lmrepair import Net, Patch, Reference, UsageError, repair
from lmrepair.patch import combine, first_bad, first_patches, forecasts

TEXT = Reference("test", ("for i in range(10):\n    print(i)\n", "the quick brown fox"))


def parts(net: Net) -> list[Patch]:
    found = []
    for failure in FAILURES[:2]:
        result = repair(net, [failure], bold_star(share="1/4", learning_rate=0.1, epochs=200, margin=0.1), TEXT)
        assert result.patch is not None
        result.patch.revert(net)
        found.append(result.patch)
    return found


def least_margin(net: Net, patch: Patch) -> float:
    return -float(net.prefer(net.batches([item.tokens for item in patch.items])).gap.max())


@pytest.mark.parametrize("kind", oracle_models.KINDS)
@pytest.mark.parametrize("whole", [False, True])
def test_a_small_change_moves_the_margin_as_foretold(kind: str, whole: bool) -> None:
    net = oracle_models.net(kind)
    before = State.of(net)
    owner, other = parts(net)
    small = {at: replace(change, deltas=change.deltas * 1e-3) for at, change in other.changes.items()}
    other = replace(other, changes=small)
    if whole:
        other = factored(net, other, rank=32)
    (found, _) = forecasts(net, [owner, other])
    assert (found.owner, found.other, found.failure) == (0, 1, FAILURES[0].id)
    with owner.on(net):
        alone = least_margin(net, owner)
    with combine([owner, other], net).on(net):
        both = least_margin(net, owner)
    assert found.margin == pytest.approx(alone, abs=1e-5)
    assert found.foretold - found.margin == pytest.approx(both - alone, rel=0.05, abs=2e-5)
    assert not found.danger
    assert not before.changed(net)


@pytest.mark.parametrize("kind", oracle_models.KINDS)
def test_the_forecast_is_of_all_logits_so_that_another_token_may_overtake(kind: str) -> None:
    net = oracle_models.net(kind)
    owner, other = parts(net)
    (found, _) = forecasts(net, [owner, other])
    (batch,) = net.batches([owner.items[0].tokens])

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            return net.logits(batch).double()

    small = {at: replace(change, deltas=change.deltas * 1e-2) for at, change in other.changes.items()}
    with owner.on(net):
        alone = logits()
    with combine([owner, replace(other, changes=small)], net).on(net):
        moved = alone + (logits() - alone) / 1e-2
    rows, overtaken = torch.arange(len(batch.wanted)), []
    least = []
    for values in (alone, moved):
        rivals = values.scatter(1, batch.wanted[:, None], float("-inf"))
        overtaken.append(rivals.argmax(dim=1))
        least.append(float((values[rows, batch.wanted] - rivals.max(dim=1).values).min()))
    assert found.margin == pytest.approx(least[0], abs=1e-5)
    assert found.foretold == pytest.approx(least[1], rel=0.05, abs=0.02)
    assert bool((overtaken[0] != overtaken[1]).any())  # by the present rivals alone it would be another number


def test_a_patch_that_undoes_another_is_a_danger() -> None:
    net = oracle_models.net()
    owner, _ = parts(net)
    back = {layer: replace(change, deltas=-change.deltas) for layer, change in owner.changes.items()}
    found = forecasts(net, [owner, replace(owner, changes=back, items=())])
    assert [one.danger for one in found] == [True]


@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_the_first_bad_state_is_found_by_halving(count: int) -> None:
    for bad in range(1, count + 1):
        at, looked = first_bad(count, lambda state, bad=bad: state < bad)  # type: ignore[misc]
        assert at == bad
        assert len(looked) <= 2 + count.bit_length()


def test_states_that_cannot_be_judged_are_gone_around() -> None:
    def judged(bad: int, dark: set[int]) -> Callable[[int], bool | None]:
        return lambda state: None if state in dark else state < bad

    assert first_bad(8, judged(6, {4}))[0] == 6
    assert first_bad(8, judged(2, {4, 5}))[0] == 2
    with pytest.raises(UsageError, match="one of the patches 4 to 6 broke it"):
        first_bad(8, judged(5, {4, 5}))
    with pytest.raises(UsageError, match="fails on the model without any patch"):
        first_bad(3, judged(0, set()))
    with pytest.raises(UsageError, match="there is nothing to find"):
        first_bad(3, judged(9, set()))


def test_the_first_patches_are_added_or_put_on_in_turn() -> None:
    net = oracle_models.net()
    before = State.of(net)
    one, two = parts(net)
    with first_patches(net, [one, two]):
        added = [net.columns(layer).clone() for layer in range(net.layers)]
    with combine([one, two], net).on(net):
        assert all(torch.equal(net.columns(layer), values) for layer, values in enumerate(added))
    with one.on(net):
        result = repair(net, [FAILURES[2]], bold_star(share="1/4", learning_rate=0.1, epochs=200, margin=0.1), TEXT)
        assert result.patch is not None
        result.patch.revert(net)
    with first_patches(net, [one, result.patch]):
        assert not net.prefer(net.batches([item.tokens for item in result.patch.items])).gap.max() >= 0
    assert not before.changed(net)
