"""Forecasts against what happens, and the first bad patch against a list that is looked through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import oracle_models
import pytest
import torch
from factored import factored, made_up
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
def test_margins_are_foretold_as_they_come(kind: str, whole: bool) -> None:
    net = oracle_models.net(kind)
    before = State.of(net)
    made = parts(net)
    if whole:
        made[1] = factored(net, made[1], rank=32)
    found = forecasts(net, made)
    assert [(one.owner, one.other, one.failure) for one in found] == [(0, 1, FAILURES[0].id), (1, 0, FAILURES[1].id)]
    for one in found:
        with made[one.owner].on(net):
            alone = least_margin(net, made[one.owner])
        with combine(made, net).on(net):
            both = least_margin(net, made[one.owner])
        assert abs(both - alone) > 0.01
        assert one.margin == pytest.approx(alone, abs=1e-4)
        assert one.foretold == pytest.approx(both, abs=1e-4)
        assert one.danger == (both <= 0)
    assert not before.changed(net)


def test_every_failure_of_a_patch_is_looked_at_and_those_that_it_does_not_repair_are_not() -> None:
    net = oracle_models.net()
    owner, other = made_up(net, FAILURES[:3]), made_up(net, FAILURES[:1], seed=1)
    (first, *rest) = owner.items
    owner = replace(owner, items=(replace(first, repaired=False), *rest))
    found = forecasts(net, [owner, other, owner])
    assert [(one.owner, one.other, one.failure) for one in found] == [
        *((0, at, failure.id) for at in (1, 2) for failure in FAILURES[1:3]),
        *((1, at, FAILURES[0].id) for at in (0, 2)),
        *((2, at, failure.id) for at in (0, 1) for failure in FAILURES[1:3]),
    ]
    with combine([owner, other], net).on(net):
        margins = [-float(net.prefer(net.batches([item.tokens])).gap.max()) for item in rest]
    assert [one.foretold for one in found[:2]] == pytest.approx(margins, abs=1e-4)


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
