"""Every method through one table; STAR and SGD against the oracle, step by step."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import oracle
import oracle_models
import pytest
import torch
from oracle_models import FAILURES, State
from torch import Tensor

from lmrepair import (
    AlphaEdit,
    Direct,
    Emmet,
    Failure,
    FineTune,
    Lora,
    Memit,
    Method,
    MinKl,
    Mint,
    Net,
    Reference,
    Rome,
    Sgd,
    Star,
    UsageError,
    diagnose,
    repair,
    repair_each,
)
from lmrepair.methods import METHODS, method_named
from lmrepair.methods.base import Problem, Targeted
from lmrepair.methods.keyed.keyed import Keyed
from lmrepair.methods.maths.basis import Bases
from lmrepair.model.edit import Product
from lmrepair.model.net import settled
from lmrepair.model.statistics.moments import Metric

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
    "star, identity": Star(learning_rate=0.1, epochs=200, metric="identity"),
    "star, sampled": Star(learning_rate=0.1, epochs=200, metric="sampled", samples=64),
    "star, full": Star(learning_rate=0.1, epochs=200, metric="full"),
    "star, found": Star(stride=0.5),
    "star, found, sampled": Star(stride=0.5, metric="sampled", samples=64),
    "direct": Direct(),
    "direct, one layer": Direct(span="1/4"),
    "direct, all layers": Direct(span="1"),
    "direct, diagonal": Direct(inputs="diagonal"),
    "direct, astra": method_named("direct", "astra", epochs=40, margin=1.0),
    "rome": Rome(),
    "rome, sampled": Rome(inputs="sampled", samples=32),
    "emmet": Emmet(),
    "memit": Memit(),
    "memit, last layers": Memit(depth=1.0, span="2/3"),
    "alphaedit": AlphaEdit(threshold=0.3, span="1/2"),
    "minkl": MinKl(),
    "minkl, margin": MinKl(margin=3.0),
    "minkl, sampled": MinKl(inputs="sampled", outputs="sampled", samples=64),
    "minkl, diagonal": MinKl(inputs="diagonal", outputs="diagonal"),
    "minkl, none": MinKl(inputs="none", outputs="none", epochs=40),
    "minkl, few neurons": MinKl(neurons=16, max_probe_kl=float("inf")),
    "minkl, one layer": MinKl(layers="one"),
    "minkl, batch": MinKl(mode="batch"),
    "minkl, iterative": MinKl(mode="iterative"),
    "mint": Mint(factor=0.1),
    "mint, basis": Mint(factor=0.3, variant="basis"),
    "mint, activation": Mint(factor=0.1, rank_by="activation"),
    "mint, random": Mint(factor=0.3, rank_by="random", epochs=30),
    "mint, orthogonal": Mint(factor=0.1, orthogonal=True),
    "sgd": Sgd(learning_rate=0.3, epochs=300, early=True),
    "sgd, found": Sgd(stride=0.5, epochs=100, early=True),
    "finetune": FineTune(learning_rate=0.01),
    "finetune, iterative": FineTune(learning_rate=0.01, mode="iterative"),
    "finetune, found": FineTune(stride=0.5),
    "lora": Lora(learning_rate=0.02),
    "lora, batch": Lora(learning_rate=0.02, mode="batch"),
    "lora, found": Lora(stride=0.5),
}
# What tiny models of random weights write is noise before and after: there is nothing to destroy.
TABLE = {name: dataclasses.replace(method, max_probe_kl=math.inf) for name, method in TABLE.items()}
# A method on both models, its settings on one or the other.
PAIRS = [
    (name, kind)
    for at, name in enumerate(TABLE)
    for kind in (oracle_models.KINDS[at % 2 :][:1] if "," in name else oracle_models.KINDS)
]
# Everything with targeting flags, under each of them.
TARGETED = [name for name, kind in METHODS.items() if issubclass(kind, Targeted)]
TARGETS: list[dict[str, str]] = [
    {"layers": "one"},
    {"layers": "1/2", "share": "1/4"},
    {"pattern": "global", "share": "1/16"},
    {"pattern": "layer", "share": "1/4"},
    {"pattern": "even", "share": "1/64"},
]


def problem(net: Net, method: Method, focus: Tensor | None = None, count: int = len(FAILURES)) -> Problem:
    """A method's first step on the first failures."""
    batches = net.batches(net.tokenize(FAILURES[:count]))
    with settled(net.model):
        preference = net.prefer(batches)
        sites = method.sites(net, batches, preference)
        reading = method.read(net, batches, sites, focus, None)
    everywhere = torch.ones(len(preference.gap), dtype=torch.bool)
    zeros = {layer: torch.zeros(len(columns), net.hidden) for layer, columns in sites.columns.items()}
    bases, asked = Bases.of(net, getattr(method, "gain", False)), method.asks()
    known = oracle_models.statistics(net, method)
    metric = Metric.of(known, asked.damping) if known and asked else None
    return Problem(
        net, tuple(batches), sites, reading, everywhere if focus is None else focus, zeros, bases, 0,
        metric=metric, probe=lambda deltas: 0.1 * sum(float(delta.square().sum()) for delta in deltas.values()),
    )  # fmt: skip


def dense(delta: Tensor | Product) -> Tensor:
    return delta.dense() if isinstance(delta, Product) else delta


def near_miss(net: Net) -> Failure:
    """A failure whose target is the token that the net prefers next after its best."""
    for prompt in ("open", "sum of", "list:", "say", "def"):
        ids = net.tokenizer(prompt)["input_ids"]
        second = int(oracle.logits(net.model, ids)[-1].argsort(descending=True)[1])
        failure = Failure(prompt, str(net.tokenizer.decode([second])), "near")
        if second > 1 and net.tokenize([failure])[0].target == (second,):
            return failure
    raise AssertionError("no prompt whose second-best token is a text of its own")


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_every_method_repairs_and_leaves_nothing_half_done(name: str, kind: str) -> None:
    net = oracle_models.net(kind)
    before = State.of(net)
    # One mistake after another, a tiny model takes two failures for a tug of war; ten neurons of its 144
    # are too few for more than one token.
    failures = FAILURES[2:3] if TABLE[name].mode == "iterative" else FAILURES[:2]
    # What edits at a prompt's last token alone is held to targets of one token.
    short = TABLE[name].undoes or isinstance(TABLE[name], Keyed)
    known = oracle_models.statistics(net, TABLE[name])
    result = repair(net, [near_miss(net)] if short else failures, TABLE[name], TEXT, statistics=known)
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
    focus = None
    if TABLE[name].mode == "iterative":  # its problems are about one position
        focus = torch.zeros(sum(len(item.target) for item in net.tokenize(FAILURES)), dtype=torch.bool)
        focus[0] = True
    method = TABLE[name]
    if isinstance(method, Keyed):
        method = dataclasses.replace(method, values=8)
    given = problem(net, method, focus)
    random = torch.random.get_rng_state()
    first, again = method.solve(given), method.solve(given)
    for layer, columns in given.sites.columns.items():
        assert dense(first.deltas[layer]).shape == (len(columns), net.hidden)
        assert isinstance(first.deltas[layer], Product) or first.deltas[layer].dtype == torch.float32
        assert bool(dense(first.deltas[layer]).isfinite().all())
        assert torch.equal(dense(first.deltas[layer]), dense(again.deltas[layer]))
    assert any(bool(dense(delta).any()) for delta in first.deltas.values())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not before.changed(net)
    # So is a second step, from what the first one left.
    then = dataclasses.replace(given, deltas=first.deltas, memory=first.memory, step=1)
    second, again = method.solve(then), method.solve(then)
    assert all(torch.equal(dense(second.deltas[layer]), dense(again.deltas[layer])) for layer in given.sites.layers)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("name", TARGETED)
def test_targeting_says_where_every_targeted_method_writes(name: str, target: dict[str, str]) -> None:
    """Repaired or honestly not, the patch stays where the flags say, and the net is as it was."""
    net = oracle_models.net()
    before = State.of(net)
    method = dataclasses.replace(TABLE[name], **target, epochs=30)
    (result,) = repair_each(net, FAILURES[:1], method, statistics=oracle_models.statistics(net, method))
    assert not before.changed(net)
    assert result.patch is not None
    count = 1 if target.get("layers") == "one" or target.get("pattern") == "layer" else 2 if "layers" in target else 3
    share = Fraction(target.get("share", "1"))
    most = (
        math.ceil(share * oracle_models.WIDTH) * count
        if target.get("pattern") != "global"
        else math.ceil(share * oracle_models.WIDTH * count)
    )
    assert 0 < result.patch.layers <= count
    assert 0 < result.patch.neurons <= most
    (outcome,) = result.outcomes
    with result.patch.on(net):
        (found,) = diagnose(net, FAILURES[:1])
    assert found.mistakes == outcome.after
    assert outcome.repaired == (not found.mistakes) == (not outcome.reason)
    assert not before.changed(net)


def test_mint_has_no_targeting_flags() -> None:
    for setting, value in (("layers", "1/2"), ("pattern", "even"), ("share", "1/4")):
        with pytest.raises(UsageError, match=f"method 'mint' has no setting '{setting}'"):
            method_named("mint", **{setting: value})
    with pytest.raises(UsageError, match="mode 'batch' is unknown; known: iterative"):
        method_named("mint", mode="batch")


@pytest.mark.parametrize("name", ["sgd", "finetune", "lora"])
def test_a_margin_that_no_step_would_look_at_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="set --early"):
        method_named(name, early=False, margin=1.0)


@pytest.mark.parametrize("name", ["sgd", "finetune", "lora", "star", "minkl"])
def test_a_margin_holds_at_every_position(name: str) -> None:
    net = oracle_models.net()
    gaps = []
    for margin in (0.0, 2.0):
        (result,) = repair_each(net, FAILURES[:1], dataclasses.replace(TABLE[name], margin=margin, early=True))
        assert result.patch is not None
        assert result.repaired == 1
        with result.patch.on(net):
            gaps.append(float(net.prefer(net.batches(net.tokenize(FAILURES[:1]))).gap.max()))
    assert gaps[0] < 0
    assert gaps[1] < -2


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
    method = Star(learning_rate=0.03, metric="identity", **settings)
    given = problem(net, method, count=count)
    tokens = [item for batch in given.batches for item in batch.tokens]
    compare(net, method, given, tokens, torch.ones(sum(len(item.target) for item in tokens), dtype=torch.bool))


def test_an_iterative_step_is_about_one_position() -> None:
    net = oracle_models.net()
    method = Star(learning_rate=0.03, mode="iterative", share="1", metric="identity")
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
    method = Star(learning_rate=0.03, share="1", metric="identity")
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
    (result,) = repair_each(net, failures, Sgd(learning_rate=0.3, epochs=10, max_probe_kl=math.inf))
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


def test_mint_is_as_published_unless_told_otherwise() -> None:
    assert method_named("mint", "paper") == Mint()
    assert (Mint().factor, Mint().epochs, Mint().candidates, Mint().rounds) == (0.01, 10, 10, 1)


def test_settings_that_do_not_exist_are_refused() -> None:
    cases: list[tuple[str, str | None, dict[str, Any], str]] = [
        ("stra", None, {}, "did you mean 'star'"),
        ("star", "papers", {}, "did you mean 'paper'"),
        ("star", None, {"learnign_rate": 1}, "did you mean 'learning_rate'"),
        ("star", None, {"name": "x"}, "no setting 'name'"),
        ("star", None, {"mode": "multi"}, "mode 'multi' is unknown"),
        ("star", None, {"epochs": 0}, "at least 1"),
        ("star", None, {"rounds": 0}, "at least 1"),
        ("star", None, {"learning_rate": -0.1}, "above 0"),
        ("star", None, {"stride": 0.0}, "above 0"),
        ("sgd", None, {"descent": math.inf}, "above 0"),
        ("direct", None, {"token_neurons": -1}, "token_neurons is -1"),
        ("mint", None, {"max_probe_kl": 0.0}, "max_probe_kl is 0.0"),
        ("minkl", None, {"max_probe_kl": math.nan}, "max_probe_kl is nan"),
        ("sgd", None, {"learning_rate": float("nan")}, "above 0"),
        ("finetune", None, {"learning_rate": float("inf")}, "above 0"),
        ("mint", None, {"factor": 0.0}, "above 0"),
        ("mint", None, {"candidates": 0}, "at least 1"),
        ("mint", None, {"rank_by": "attributions"}, "rank_by 'attributions' is unknown"),
        ("lora", None, {"rank": 0}, "at least 1"),
        ("star", None, {"margin": float("nan")}, "margin is nan; expected a number of logits, 0 or more"),
        ("minkl", None, {"margin": math.inf}, "margin is inf; expected a number of logits, 0 or more"),
        ("minkl", "paper", {}, "method 'minkl' has no preset 'paper'; these have it: star, mint, sgd$"),
    ]
    for name, preset, settings, said in cases:
        with pytest.raises(UsageError, match=said):
            method_named(name, preset, **settings)


def test_a_setting_means_one_thing_in_all_methods() -> None:
    """The command line has one option for each name, of one type."""
    kinds: dict[str, set[str]] = {}
    for method in METHODS.values():
        for spec in dataclasses.fields(method):
            kinds.setdefault(spec.name, set()).add(str(spec.type))
    assert {name: found for name, found in kinds.items() if len(found) > 1} == {}
