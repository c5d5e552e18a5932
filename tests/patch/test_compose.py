"""Patches put together and taken apart: sums of deltas, whatever the order, and nothing for another model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import permutations
from pathlib import Path

import oracle_models
import pytest
import torch
from factored import factored, made_up
from oracle_models import FAILURES, State, same_bits

from lmrepair import Patch, PatchError, WrongModelError, load
from lmrepair.patch import combine, difference, held_whole, rewrite, save_model, without


@cache
def parts(seed: int = 0) -> tuple[Patch, ...]:
    """A patch a failure, each for the untouched model; they share some neurons and not others."""
    net = oracle_models.net(seed=seed)
    return tuple(made_up(net, [failure], at) for at, failure in enumerate(FAILURES[:3]))


def dense(patch: Patch) -> dict[int, torch.Tensor]:
    found = {}
    for layer in range(oracle_models.LAYERS):
        found[layer] = torch.zeros(oracle_models.WIDTH, oracle_models.HIDDEN, dtype=torch.float64)
        if layer in patch.changes:
            change = patch.changes[layer]
            found[layer][change.columns] = change.deltas.double()
    return found


def test_a_composition_is_the_sum_in_any_order() -> None:
    made = {combine(order).serialise() for order in permutations(parts())}
    assert len(made) == 1
    joint = combine(parts())
    sums = [dense(part) for part in parts()]
    for layer, total in dense(joint).items():
        wanted = sum(one[layer] for one in sums)
        assert (total - wanted).abs().max() <= 2**-24 * wanted.abs().max()
    assert {item.tokens.id for item in joint.items} == {failure.id for failure in FAILURES[:3]}
    assert len(joint.made.settings["parts"]) == 3


def test_a_composition_is_a_patch_on_the_net_in_a_file_and_on_the_disk(tmp_path: Path) -> None:
    net = oracle_models.net()
    before = State.of(net)
    for joint in (combine(parts()), combine(parts(), net)):
        joint.save(tmp_path / "c.safetensors")
        loaded = Patch.load(tmp_path / "c.safetensors")
        assert loaded.serialise() == joint.serialise()
        loaded.apply(net)
        assert loaded.is_applied(net)
        loaded.revert(net)
        assert not before.changed(net)
        assert held_whole(net, loaded).claimed == 3
    assert "" not in combine(parts(), net).fingerprint.layers
    save_model(net, tmp_path / "model")
    rewrite(tmp_path / "model", combine(parts()), False, tmp_path / "patched")
    assert combine(parts()).is_applied(load(tmp_path / "patched"))


def test_a_part_comes_out_again() -> None:
    one, two, three = parts()
    joint = combine([one, two, three])
    left = without(joint, three)
    pair = combine([one, two])
    assert left.made.settings == pair.made.settings
    assert left.items == pair.items
    for layer, wanted in dense(pair).items():
        assert (dense(left)[layer] - wanted).abs().max() <= 2**-23 * dense(joint)[layer].abs().max()
    last = without(left, two)
    assert {item.tokens.id for item in last.items} == {item.tokens.id for item in one.items}
    for layer, change in one.changes.items():
        mine = torch.isin(last.changes[layer].columns, change.columns)
        assert same_bits(last.changes[layer].originals[mine], change.originals)
    with pytest.raises(PatchError, match="no such part"):
        without(left, three)
    with pytest.raises(PatchError, match="no such part"):
        without(one, two)
    with pytest.raises(PatchError, match="nothing is left"):
        without(last, one)


def test_whole_layers_as_factors_add_up_with_the_model() -> None:
    net = oracle_models.net()
    before = State.of(net)
    made = [factored(net, part) for part in parts()[:2]]
    with pytest.raises(PatchError, match="name it with --model"):
        combine(made)
    joint = combine(made, net)
    assert joint.serialise() == combine(made[::-1], net).serialise()
    for layer, total in dense(joint).items():
        wanted = dense(made[0])[layer] + dense(made[1])[layer]
        assert (total - wanted).abs().max() <= 2**-15 * wanted.abs().max()
    mixed = combine([made[0], parts()[0]], net)
    for patch in (joint, mixed):
        patch.apply(net)
        patch.revert(net)
        assert not before.changed(net)
    left = without(joint, made[1], net)
    for layer, wanted in dense(made[0]).items():
        assert (dense(left)[layer] - wanted).abs().max() <= 2**-15 * wanted.abs().max()
    left.apply(net)
    left.revert(net)
    assert not before.changed(net)


def test_what_does_not_add_up_is_refused() -> None:
    one, two, _ = parts()
    with pytest.raises(PatchError, match="the same patch twice"):
        combine([one, two, one])
    with pytest.raises(PatchError, match="expected two or more"):
        combine([one])
    with pytest.raises(WrongModelError, match="for different models"):
        combine([one, parts(1)[0]])
    layer, change = next(iter(two.changes.items()))
    moved = replace(two, changes={**two.changes, layer: replace(change, originals=change.originals + 1)})
    with pytest.raises(WrongModelError, match="found other neurons in layer"):
        combine([replace(two, items=one.items), moved])
    huge = {at: replace(c, deltas=torch.full_like(c.deltas, 3e38)) for at, c in one.changes.items()}
    with pytest.raises(PatchError, match="not finite"):
        combine([replace(one, changes=huge), replace(one, changes=huge, items=two.items)])


def test_the_difference_is_by_layer() -> None:
    one, two, _ = parts()
    for found in difference(one, two):
        a, b = dense(one)[found.layer], dense(two)[found.layer]
        assert found.norms == pytest.approx((float(a.norm()), float(b.norm())))
        assert found.distance == pytest.approx(float((a - b).norm()))
        both = ((a != 0).any(dim=1) & (b != 0).any(dim=1)).sum()
        assert found.both == both
        assert found.both + found.first == len(one.changes[found.layer].columns)
    assert all(found.cosine == pytest.approx(1.0) for found in difference(one, one))
