"""Layers that lie on different devices: every method does what it does on one."""

from __future__ import annotations

import mixtures
import oracle_models
import pytest
import torch
from elsewhere import ELSEWHERE, back, elsewhere, sent, split
from oracle_models import FAILURES, TEXT, tokenizer
from torch import Tensor

from lmrepair import Gate, MinKl, Net, Patch, repair, statistics_of
from lmrepair.model import fingerprint

NEAR = 1e-3  # share of a layer's change
OWN = 12  # texts that a model writes for its statistics here
pytestmark = pytest.mark.timeout(900)
PARTS = ["model.embed_tokens", "model.rotary_emb", *(f"model.layers.{at}" for at in range(3)), "model.norm", "lm_head"]
MIXTURE = ["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head"]
CASES = [("here", "1"), ("elsewhere", "1"), ("elsewhere", "last")]


def made(net: Net, method: MinKl) -> tuple[Patch | None, list[tuple[int, ...]]]:
    """A repair, taken back; and how many mistakes were left."""
    asked = method.asks()
    assert asked is not None
    known = statistics_of(net, asked, own=OWN)
    found = repair(net, FAILURES[:2], method, TEXT, statistics=known, gate=Gate(float("inf"), (TEXT,)))
    if found.patch is not None:
        found.patch.revert(net)
    return found.patch, [(len(one.before), len(one.after)) for one in found.outcomes]


@pytest.mark.parametrize(("head", "layers"), CASES)
def test_layers_on_two_devices_make_the_patch_of_one(head: str, layers: str) -> None:
    method = MinKl(layers=layers)
    wanted, left = made(oracle_models.net(), method)
    there = ["model.layers.1"] if head == "here" else [part for part in PARTS if part != "model.layers.1"]
    with elsewhere():
        net = Net(split(oracle_models.model(), there), tokenizer(), "tiny-llama")
        assert (net.device == ELSEWHERE) == (head == "elsewhere")
        before = fingerprint(net, {})
        found, remaining = made(net, method)
        assert fingerprint(net, {}) == before
    assert remaining == left
    same(found, wanted, exact=head == "here")


def same(found: Patch | None, wanted: Patch | None, exact: bool) -> None:
    """Whether two patches are one; not ``exact``, but for rounding: where the head is on no CPU, failures are read
    side by side."""
    assert (found is None) == (wanted is None)
    if found is None or wanted is None:
        return
    assert found.fingerprint.body == wanted.fingerprint.body
    assert found.changes.keys() == wanted.changes.keys()
    for layer, change in wanted.changes.items():
        other = found.changes[layer].deltas
        assert torch.equal(found.changes[layer].columns, change.columns)
        assert torch.equal(other, change.deltas) if exact else off_by(other, change.deltas) < NEAR


def off_by(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_a_mixture_on_two_devices_makes_the_patch_of_one() -> None:
    wanted, left = made(mixtures.net("mixtral"), MinKl())
    with elsewhere():
        net = Net(split(mixtures.model("mixtral"), MIXTURE), tokenizer(), "tiny-mixtral")
        found, remaining = made(net, MinKl())
    assert remaining == left
    same(found, wanted, exact=False)


def test_the_other_device_refuses_company() -> None:
    here = torch.ones(3)
    with elsewhere():
        there = sent(torch.ones(3))
        assert there.device == ELSEWHERE == (there + 1).device == torch.zeros(2, device=ELSEWHERE).device
        assert there.to("cpu").device.type == "cpu" == there.cpu().device.type
        assert here.to(there).device == ELSEWHERE
        with pytest.raises(RuntimeError, match="one device"):
            _ = there + here
        with pytest.raises(RuntimeError, match="one device"):
            _ = here[sent(torch.tensor([0]))]
        with pytest.raises(TypeError, match="cpu"):
            there.numpy()
    assert torch.equal(back(there), here)
