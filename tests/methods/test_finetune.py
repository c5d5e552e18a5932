"""Fine-tuning is torch's own Adam on the dense weights, and LoRA is PEFT's, injected into a copy of the model."""

from __future__ import annotations

import builtins
import math
from contextlib import ExitStack
from typing import Any

import oracle
import oracle_models
import pytest
import torch
from oracle_models import FAILURES, TEXT, State

from lmrepair import FineTune, Lora, Net, UsageError, repair, repair_each
from lmrepair.loop import loop
from lmrepair.loop.outcome import Repair
from lmrepair.loop.solver import Known
from lmrepair.model.edit import LowRank


def agree(result: Repair, wanted: dict[int, torch.Tensor], tolerance: float) -> None:
    assert result.patch is not None
    assert sorted(result.patch.changes) == sorted(wanted)
    for layer, change in result.patch.changes.items():
        scale = float(wanted[layer].abs().max())
        assert float((change.deltas.double() - wanted[layer][change.columns]).abs().max()) < tolerance * scale


@pytest.mark.parametrize("kind", oracle_models.KINDS)
def test_finetuning_is_torchs_adam(kind: str) -> None:
    net = oracle_models.net(kind, dtype=torch.float64)
    pairs = oracle_models.pairs(net.tokenize(FAILURES[:1]))
    (result,) = repair_each(
        net, FAILURES[:1], FineTune(learning_rate=3e-4, epochs=10, early=False, max_probe_kl=math.inf)
    )
    assert result.cost.steps == 10
    agree(result, oracle.adam_steps(net.model, range(net.layers), pairs, 3e-4, 10), 1e-3)


@pytest.mark.parametrize("kind", [FineTune, Lora])
def test_a_second_problem_starts_afresh_on_what_the_first_left(kind: type[FineTune] | type[Lora]) -> None:
    """Two failures in turn are as two patches one after the other, each with an optimiser of its own."""
    net = oracle_models.net()
    method = kind(learning_rate=0.01, mode="batch", epochs=3, early=False, max_probe_kl=math.inf)
    both = loop._attempt(
        loop.Case.of(net, FAILURES[:2]), method, Known.of(net, method, FAILURES[:2], None, loop.quiet), loop.quiet, None
    ).changes
    summed: dict[int, torch.Tensor] = {}
    with ExitStack() as applied:
        for failure in FAILURES[:2]:
            (result,) = repair_each(net, [failure], method)
            assert result.patch is not None
            applied.enter_context(result.patch.on(net))
            for layer, change in result.patch.changes.items():
                assert len(change.columns) == net.widths[layer]
                summed[layer] = summed.get(layer, torch.zeros(1)) + change.deltas
    for layer, change in both.items():
        assert float((change.deltas - summed[layer]).abs().max()) < 1e-5


@pytest.mark.parametrize("kind", oracle_models.KINDS)
def test_lora_is_pefts_injected_into_a_copy(kind: str) -> None:
    """The same adapters trained by PEFT's forward pass, torch's backward and torch's Adam on the model itself."""
    net = oracle_models.net(kind, dtype=torch.float64)
    pairs = oracle_models.pairs(net.tokenize(FAILURES[:1]))
    (result,) = repair_each(
        net, FAILURES[:1], Lora(rank=3, learning_rate=0.01, epochs=8, early=False, seed=5, max_probe_kl=math.inf)
    )
    agree(result, peft_steps(net, pairs, 3, 0.01, 8, 5), 2e-3)


def peft_steps(net: Net, pairs: Any, rank: int, rate: float, steps: int, seed: int) -> dict[int, torch.Tensor]:
    """Layer → merged change [m, d], with the adapters in the model (found by identity, not by a table of names)."""
    from peft import LoraConfig, inject_adapter_in_model

    twin = oracle._twin(net.model)
    matrices = oracle._matrices(twin)
    names = [name for matrix in matrices for name, module in twin.named_modules() if module is matrix]
    conv = type(matrices[0]).__name__ == "Conv1D"
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names, fan_in_fan_out=conv)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, twin, "x")
    parts = [dict(twin.named_modules())[name] for name in names]
    # PEFT draws A in the order of the layers here and there.
    trained = [value for name, value in twin.named_parameters() if "lora_" in name]
    for parameter in twin.parameters():
        parameter.requires_grad_(any(parameter is value for value in trained))
    optimiser = torch.optim.Adam(trained, lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        oracle._mean_loss(twin, pairs).backward()
        optimiser.step()
    found = [part.get_delta_weight("x").detach() for part in parts]
    return {layer: delta if conv else delta.T for layer, delta in enumerate(found)}


@pytest.mark.parametrize("kind", oracle_models.KINDS)
def test_a_lora_patch_has_its_rank_and_the_net_has_no_adapters(kind: str) -> None:
    net = oracle_models.net(kind)
    before = State.of(net)
    modules = [id(module) for module in net.model.modules()]
    result = repair(net, FAILURES[:2], Lora(learning_rate=0.02, rank=2, max_probe_kl=math.inf), TEXT)
    assert result.repaired == 2
    assert result.patch is not None
    assert len(result.patch.changes) == net.layers
    for change in result.patch.changes.values():
        assert isinstance(change, LowRank)
        assert change.product.rank == 2
        assert torch.linalg.matrix_rank(change.deltas, rtol=1e-4) == 2
    assert [id(module) for module in net.model.modules()] == modules
    assert {name.rsplit(".", 1)[-1] for name in before.changed(net)} == {"weight"}
    result.patch.revert(net)
    assert not before.changed(net)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at", ["peft.inject_adapter_in_model", "torch.autograd.grad", "lmrepair.model.net.Net.prefer"])
def test_whatever_breaks_lora_the_net_has_no_adapters(
    at: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = oracle_models.net()
    before = State.of(net)
    modules = [id(module) for module in net.model.modules()]
    place, name = at.rsplit(".", 1)
    owner: Any = Net if place.endswith("Net") else __import__(place, fromlist=["_"])

    def broken(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(owner, name, broken)  # of these, the last is first called by the check after all steps
    with pytest.raises(error):
        repair(net, FAILURES[:1], Lora(epochs=5), TEXT)
    assert [id(module) for module in net.model.modules()] == modules
    assert not before.changed(net)


def test_the_seed_decides_the_adapters() -> None:
    net = oracle_models.net()
    made = []
    for seed in (0, 0, 1):
        (result,) = repair_each(net, FAILURES[:1], Lora(epochs=2, early=False, seed=seed))
        assert result.patch is not None
        made.append(result.patch.changes[0].deltas)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    net = oracle_models.net()
    before = State.of(net)
    real = builtins.__import__

    def missing(name: str, *arguments: Any) -> Any:
        if name.split(".")[0] == "peft":
            raise ImportError("no peft")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UsageError) as refused:
        repair(net, FAILURES[:1], Lora())
    assert str(refused.value) == (
        "method 'lora' needs PEFT, which is not installed; pip install 'lmrepair[lora]', or choose another method"
    )
    assert not before.changed(net)
