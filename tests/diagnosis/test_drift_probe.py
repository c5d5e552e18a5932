"""The probe says how far a model has moved, and a repair that destroys the model is stopped and undone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import oracle_models
import pytest
import torch
from oracle_models import FAILURES, TEXT, State
from torch import Tensor

from lmrepair import Gate, Method, MinKl, Net, Sgd, UsageError, repair, repair_each
from lmrepair.diagnosis import drift_probe as probing
from lmrepair.diagnosis.drift_probe import Heard, Probe, divergence, listening
from lmrepair.errors import NotFiniteError
from lmrepair.loop.judge import Guard
from lmrepair.methods.base import MODES, Problem, Step
from lmrepair.model.edit import Trial

WRECK = Sgd(learning_rate=1e4)


@dataclass(frozen=True, kw_only=True)
class Pushes(Method):
    """Adds multiples of one random change, step by step."""

    name: ClassVar[str] = "pushes"
    sizes: tuple[float, ...] = (0.001, 0.002, 300.0)

    def solve(self, problem: Problem) -> Step:
        generator = torch.Generator().manual_seed(0)
        noise = {layer: torch.randn(delta.shape, generator=generator) for layer, delta in problem.deltas.items()}
        return Step({layer: self.sizes[problem.step] * part for layer, part in noise.items()})


def test_the_probe_is_the_mean_kl_at_its_positions() -> None:
    net = oracle_models.net("gpt2")
    probe = Probe.of(net)
    assert probe.kl() == pytest.approx(0.0, abs=1e-6)
    assert 8 <= len(probe.rows) <= 64
    before = _logs(net, probe)
    delta = {1: 0.3 * torch.randn(net.widths[1], net.hidden, generator=torch.Generator().manual_seed(3))}
    with Trial(net, net.every_site()) as trial:
        trial.write(delta)
        after = _logs(net, probe)
        found = probe.kl()
    assert found == pytest.approx(float((before.exp() * (before - after)).sum(dim=1).mean()), rel=1e-4)
    assert found > 1e-3


def _logs(net: Net, probe: Probe) -> Tensor:
    """Log-probabilities of every text run alone, in float64, at the probe's positions."""
    rows, width, found = set(probe.rows.tolist()), probe.batch.ids.shape[1], []
    for number, text in enumerate(probe.batch.tokens):
        logits = net.model(torch.tensor([text.ids])).logits[0].double().log_softmax(dim=1)
        found += [logits[at] for at in range(len(text.ids)) if number * width + at in rows]
    return torch.stack(found).detach()


def test_what_is_no_number_is_infinitely_far() -> None:
    logs = torch.zeros(2, 3).log_softmax(dim=1)
    assert divergence(logs, torch.full((2, 3), math.nan)) == math.inf
    assert divergence(logs, logs) == 0


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("mode", ["multi-failure", "batch", "iterative"])
def test_a_method_that_destroys_the_model_is_stopped_and_undone(mode: str, early: bool) -> None:
    net = oracle_models.net()
    before = State.of(net)
    result = repair(net, FAILURES, replace(WRECK, mode=mode, early=early), TEXT)
    assert result.repaired == 0
    assert result.cost.steps == 1
    assert result.patch is None
    failing = [outcome for outcome in result.outcomes if outcome.failing]
    assert failing
    assert all("destroys the model" in outcome.reason for outcome in failing)
    assert all(outcome.after == outcome.before for outcome in failing)
    assert not before.changed(net)


def test_alone_every_failure_is_watched() -> None:
    net = oracle_models.net("gpt2")
    for result in repair_each(net, FAILURES[:3], WRECK):
        assert result.patch is None
        assert "stopped at step 1, which was undone" in result.outcomes[0].reason


def test_the_last_state_that_still_writes_is_what_stays() -> None:
    net = oracle_models.net()
    method = Pushes(epochs=3)
    (result,) = repair_each(net, FAILURES[:1], method)
    assert "stopped at step 3" in result.outcomes[0].reason
    (gentle,) = repair_each(net, FAILURES[:1], replace(method, epochs=2))
    assert result.patch is not None
    assert gentle.patch is not None
    for layer, change in result.patch.changes.items():
        assert torch.equal(change.deltas, gentle.patch.changes[layer].deltas)


def test_the_last_step_is_looked_at_too() -> None:
    net = oracle_models.net()
    (result,) = repair_each(net, FAILURES[:1], Pushes(epochs=1, sizes=(300.0,)))
    assert result.patch is None
    assert "destroys the model" in result.outcomes[0].reason


def test_on_request_nothing_is_stopped() -> None:
    net = oracle_models.net()
    (result,) = repair_each(net, FAILURES[:1], replace(WRECK, max_probe_kl=math.inf, epochs=2))
    assert result.cost.steps == 2
    assert result.patch is not None
    with pytest.raises(UsageError, match="max_probe_kl is -1"):
        replace(WRECK, max_probe_kl=-1.0)


def test_a_gentle_repair_reads_no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the failures' own prompts say the same as before, looking at them is all that is done."""
    net = oracle_models.net()
    monkeypatch.setattr(probing.Probe, "of", lambda _: pytest.fail("the probe was read"))
    (result,) = repair_each(net, FAILURES[3:], replace(Pushes(), epochs=2))
    assert result.cost.steps == 2


def test_prompts_too_short_to_be_heard_are_no_way_around() -> None:
    net = oracle_models.net()
    short = [failure for failure in FAILURES if failure.id == "say"]
    (result,) = repair_each(net, short, WRECK)
    assert "destroys the model" in result.outcomes[0].reason


@pytest.mark.parametrize("at_once", [1, 2048])
def test_what_is_heard_belongs_to_its_failure_however_they_are_batched(at_once: int) -> None:
    net = oracle_models.net()
    batches = net.batches(net.tokenize(FAILURES), at_once)
    with torch.inference_mode(), listening(net, batches) as heard:
        net.prefer(batches)
    assert list(heard) == net.tokenize(FAILURES)
    for tokens, states in heard.items():
        assert 0 < len(states) <= probing.HEARD
        own = _states(net, tokens.ids)
        assert all(float((own - state).abs().sum(dim=1).min()) < 1e-3 for state in states)
        assert float((own[len(tokens.prompt) - 1] - states[-1]).abs().sum()) > 1e-2  # what follows is the repair's
    found = Heard.of(net, heard)
    assert found is not None
    assert found.kl(net, heard) == pytest.approx(0.0, abs=1e-6)
    assert found.kl(net, {}) is None


def _states(net: Net, ids: Sequence[int]) -> Any:
    with torch.inference_mode():
        return net.model.model(torch.tensor([list(ids)])).last_hidden_state[0]


def test_minkl_is_watched_as_all_are() -> None:
    net = oracle_models.net()
    (result,) = repair_each(net, FAILURES[:1], replace(MinKl(), max_probe_kl=1e-9))
    assert "destroys the model" in result.outcomes[0].reason
    assert result.patch is None


@pytest.mark.parametrize("watched", [1.0, math.inf])
@pytest.mark.parametrize("mode", MODES)
def test_logits_that_turn_to_nan_undo_the_step_and_stop(mode: str, watched: float) -> None:
    net = oracle_models.net()
    before = State.of(net)
    method = Pushes(epochs=3, mode=mode, sizes=(0.001, 0.002, 1e38), max_probe_kl=watched, rounds=1)
    for result in repair_each(net, FAILURES[:2], method):
        (outcome,) = result.outcomes
        assert "which was undone: it destroys the model" in outcome.reason
        assert result.patch is not None  # what stood before
        assert max(float(change.deltas.abs().max()) for change in result.patch.changes.values()) < 1
    result = repair(net, FAILURES[:2], method, TEXT)
    assert all("which was undone" in outcome.reason for outcome in result.outcomes if outcome.failing)
    assert not before.changed(net)


def test_steps_for_one_failure_that_take_another_ones_numbers_are_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    net = oracle_models.net()
    before = State.of(net)
    real, calls = Net.prefer, iter(range(100))

    def prefer(self: Net, batches: Sequence[Any]) -> Any:
        if sum(len(batch.tokens) for batch in batches) == 2 and next(calls) == 1:  # after the first round
            raise NotFiniteError("no finite numbers")
        return real(self, batches)

    monkeypatch.setattr(Net, "prefer", prefer)
    result = repair(net, FAILURES[:2], Pushes(epochs=2, mode="batch"), TEXT)
    assert result.patch is None
    assert all("which was undone" in outcome.reason for outcome in result.outcomes if outcome.failing)
    assert not before.changed(net)


def test_the_probe_of_a_model_that_writes_no_numbers_is_infinite() -> None:
    net = oracle_models.net()
    probe = Probe.of(net)
    with torch.no_grad():
        net.columns(1).fill_(math.nan)
    assert probe.kl() == math.inf


def test_a_gate_refuses_a_patch_with_which_the_model_writes_no_numbers() -> None:
    net = oracle_models.net()
    guard = Guard.of(net, Gate(references=(TEXT,)), None, net.tokenize(FAILURES[:1]))
    sites = net.every_site()
    with Trial(net, sites) as trial:
        changes = trial.changes({1: torch.full((48, 32), math.inf)})
    verdict = guard.weigh(changes, 1.0)
    assert verdict.reasons == ("what the model writes is no number any more",)
    assert not verdict.passes
