"""Every method through one table; STAR and SGD against the oracle, step by step."""

from __future__ import annotations

from typing import Any

import oracle
import oracle_models
import pytest
import torch
from oracle_models import FAILURES, State
from torch import Tensor

from lmrepair import Method, Net, Reference, Sgd, Star, UsageError, repair, repair_each
from lmrepair.basis import Bases
from lmrepair.locate import Targeting, locate
from lmrepair.methods import METHODS, Problem, method_named
from lmrepair.net import settled

TEXT = Reference("test", ("for i in range(10):\n    print(i)\n",))
# One row a method: how it is set up so that it repairs the tiny models.
TABLE: dict[str, Method] = {
    "star": Star(learning_rate=0.1, epochs=200),
    "star, all neurons": Star(learning_rate=0.1, epochs=200, share="1"),
    "star, batch": Star(learning_rate=0.02, epochs=300, mode="batch", share="1"),
    "star, iterative": Star(learning_rate=0.01, epochs=300, mode="iterative", share="1"),
    "star, gain": Star(learning_rate=0.1, epochs=200, gain=True),
    "star, one layer": Star(learning_rate=0.1, epochs=300, layers="one", share="1"),
    "star, global": Star(learning_rate=0.1, epochs=200, pattern="global"),
    "star, layer": Star(learning_rate=0.1, epochs=300, pattern="layer", share="1"),
    "sgd": Sgd(learning_rate=0.3, epochs=300, early=True),
}


def problem(net: Net, method: Method, focus: Tensor | None = None, count: int = len(FAILURES)) -> Problem:
    """A method's first step on the first failures."""
    batches = net.batches(net.tokenize(FAILURES[:count]))
    with settled(net.model):
        preference = net.prefer(batches)
        sites = locate(net, batches, preference, Targeting(method.layers, method.pattern, method.share))
        reading = net.read(batches, sites, focus)
    everywhere = torch.ones(len(preference.gap), dtype=torch.bool)
    zeros = {layer: torch.zeros(len(columns), net.hidden) for layer, columns in sites.columns.items()}
    bases = Bases.of(net, getattr(method, "gain", False))
    return Problem(net, tuple(batches), sites, reading, everywhere if focus is None else focus, zeros, bases, 0)


@pytest.mark.parametrize("kind", oracle_models.KINDS)
@pytest.mark.parametrize("name", TABLE)
def test_every_method_repairs_and_leaves_nothing_half_done(name: str, kind: str) -> None:
    net = oracle_models.net(kind)
    before = State.of(net)
    # One mistake after another, a tiny model takes two failures for a tug of war.
    result = repair(net, FAILURES[: 1 if TABLE[name].mode == "iterative" else 2], TABLE[name], TEXT)
    assert result.repaired == result.failing > 0
    assert result.patch is not None
    for outcome, made in zip(result.outcomes, net.generate([o.tokens for o in result.outcomes]), strict=True):
        assert made == outcome.tokens.target
    assert all(name.endswith("weight") for name in before.changed(net))
    result.patch.revert(net)
    assert not before.changed(net)


@pytest.mark.parametrize("name", TABLE)
def test_every_method_gives_whole_finite_deltas_and_touches_nothing(name: str) -> None:
    net = oracle_models.net()
    before = State.of(net)
    given = problem(net, TABLE[name])
    first, again = TABLE[name].solve(given), TABLE[name].solve(given)
    for layer, columns in given.sites.columns.items():
        assert first.deltas[layer].shape == (len(columns), net.hidden)
        assert first.deltas[layer].dtype == torch.float32
        assert bool(first.deltas[layer].isfinite().all())
        assert torch.equal(first.deltas[layer], again.deltas[layer])
    assert not before.changed(net)


def test_every_registered_method_is_in_the_table() -> None:
    assert {method.name for method in TABLE.values()} == set(METHODS)


@pytest.mark.parametrize("kind", oracle_models.KINDS)
@pytest.mark.parametrize(
    "settings",
    [{"share": "1"}, {"share": "1/4"}, {"share": "1", "gain": True}, {"layers": "1/2", "share": "1/16"}],
)
@pytest.mark.parametrize("count", [1, len(FAILURES)])
def test_a_star_step_is_the_oracles_entry_by_entry(kind: str, settings: dict[str, Any], count: int) -> None:
    net = oracle_models.net(kind)
    method = Star(**settings)
    given = problem(net, method, count=count)
    tokens = [item for batch in given.batches for item in batch.tokens]
    compare(net, method, given, tokens, torch.ones(sum(len(item.target) for item in tokens), dtype=torch.bool))


def test_an_iterative_step_is_about_one_position() -> None:
    net = oracle_models.net()
    method = Star(mode="iterative", share="1")
    focus = torch.zeros(sum(len(item.target) for item in net.tokenize(FAILURES[:1])), dtype=torch.bool)
    focus[1] = True
    given = problem(net, method, focus, 1)
    compare(net, method, given, list(given.batches[0].tokens), focus)


def compare(net: Net, method: Star, given: Problem, tokens: list[Any], focus: Tensor) -> None:
    """One step against the oracle's: prior from the model's own float64 reading, sign from dense autograd."""
    pairs = oracle_models.pairs(tokens)
    wrong = {
        (index, position): said
        for index, (prompt, target) in enumerate(pairs)
        for position, _, said, _ in oracle.mistakes(net.model, prompt, target)
    }
    gain = net.anatomy.gain if method.gain else None
    places = [(index, at) for index, (_, target) in enumerate(pairs) for at in range(len(target))]
    rows = []
    for index, at in places:
        if (index, at) in wrong:
            steer = oracle.steers(net.model.lm_head.weight, [pairs[index][1][at]], [wrong[index, at]], gain)
            rows.append(oracle.by_spread(steer)[0])
        else:
            rows.append(torch.zeros(net.hidden, dtype=torch.float64))
    gradients = oracle.gradients(net.model, pairs, focus.tolist())
    found = method.solve(given).deltas
    for layer, columns in given.sites.columns.items():
        z = oracle.coefficients(net.model, layer, pairs)[focus][:, columns]
        p = oracle.prior(z, torch.stack(rows)[focus])
        g = gradients[layer][columns]
        wanted = oracle.star_step(p, g, method.learning_rate)
        # Where the gradient is rounding noise its sign is too.
        clear = g.abs() > 1e-4 * g.abs().max()
        scale = float(wanted.abs().max())
        assert float((found[layer].double() - wanted)[clear].abs().max()) < 2e-3 * scale
        assert float(clear.double().mean()) > 0.9


def test_what_has_no_gradient_does_not_move() -> None:
    net = oracle_models.net()
    method = Star(share="1")
    given = problem(net, method)
    dead = given.reading.gradients[0].clone()
    dead[5], dead[:, 7] = 0.0, 0.0
    reading = type(given.reading)(given.reading.preference, False, given.reading.coefficients, {0: dead})
    step = method.solve(Problem(net, given.batches, given.sites, reading, given.focus, given.deltas, given.bases, 0))
    assert not step.deltas[0][5].any()
    assert not step.deltas[0][:, 7].any()
    assert bool(step.deltas[0][dead != 0].ne(0).double().mean() > 0.99)


@pytest.mark.parametrize("kind", oracle_models.KINDS)
def test_sgd_is_torchs(kind: str) -> None:
    net = oracle_models.net(kind)
    failures = FAILURES[:1]
    pairs = oracle_models.pairs(net.tokenize(failures))
    wanted = oracle.sgd_steps(net.model, range(net.layers), pairs, 0.3, 10)
    (result,) = repair_each(net, failures, Sgd(learning_rate=0.3, epochs=10))
    assert result.cost.steps == 10
    assert result.patch is not None
    for layer, change in result.patch.changes.items():
        scale = float(wanted[layer].abs().max())
        assert float((change.deltas.double() - wanted[layer][change.columns]).abs().max()) < 1e-3 * scale


def test_the_paper_preset_is_the_published_loop() -> None:
    method = method_named("star", "paper")
    assert (method.epochs, method.early, method.mode, method.share, method.layers) == (10, False, "batch", "1", "1")
    assert method.settings()["learning_rate"] == 0.01
    net = oracle_models.net()
    assert repair(net, FAILURES[:1], method, TEXT).cost.steps == 10


def test_settings_that_do_not_exist_are_refused() -> None:
    cases: list[tuple[str, str | None, dict[str, Any], str]] = [
        ("stra", None, {}, "did you mean 'star'"),
        ("star", "papers", {}, "did you mean 'paper'"),
        ("star", None, {"learnign_rate": 1}, "did you mean 'learning_rate'"),
        ("star", None, {"name": "x"}, "no setting 'name'"),
        ("star", None, {"mode": "multi"}, "mode 'multi' is unknown"),
        ("star", None, {"epochs": 0}, "at least 1"),
        ("star", None, {"margin": float("nan")}, "margin"),
    ]
    for name, preset, settings, said in cases:
        with pytest.raises(UsageError, match=said):
            method_named(name, preset, **settings)
