"""The gate: each condition alone makes it act, bisection and dropping do what they say, nothing is half-done."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import oracle_models
import pytest
import torch
from command import ROWS, Run, write
from oracle_models import FAILURES, State, bold_star

from lmrepair import (
    Failure,
    FailuresError,
    Gate,
    Method,
    Net,
    Patch,
    Protected,
    Reference,
    Repair,
    UsageError,
    WrongModelError,
    read_protected,
    repair,
    repair_each,
)
from lmrepair.failures import shipped
from lmrepair.failures.tokens import Tokens
from lmrepair.loop import loop, repair_alone
from lmrepair.loop.judge import GRID, RESOLUTION, Guard, Scaled, Verdict, needed_scales
from lmrepair.loop.untouched import Untouched
from lmrepair.model import quiet, writing
from lmrepair.model.edit import Change, LowRank, Product, Trial, patched, same_bits
from lmrepair.model.statistics import windows

ONE = Reference("one", ("for i in range(10):\n    print(i)\n",))
TWO = Reference("two", ("select name from persons;", "{}"))
STAR = bold_star(learning_rate=0.1, epochs=100)
STEADY = bold_star(learning_rate=0.03, epochs=400, share="1")
OPEN = Gate(math.inf, (ONE,))
MORE = [
    Failure("name the largest of", " max(a)", "max"),
    Failure("read json", " json.load(f)", "json"),
    Failure("sort it", " sorted(a)", "sort"),
]


def solved(net: Net, failures: list[Failure], method: Method = STAR) -> dict[int, Change]:
    """The changes of one joint patch that no gate looked at."""
    patch = repair(net, failures, method, ONE).patch
    assert patch is not None
    patch.revert(net)
    return dict(patch.changes)


def twin(net: Net, changes: dict[int, Change], scale: float) -> Any:
    """A copy of the net's model with the deltas times ``scale`` added by hand."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        for layer, change in changes.items():
            other.columns(layer)[change.columns] += scale * change.deltas
    return other.model


def kl(net: Net, changes: dict[int, Change], scale: float, reference: Reference) -> float:
    texts = [item.ids for item in windows(net, reference.texts)]
    return float(oracle.drift(net.model, twin(net, changes, scale), texts)[0])


def says(model: Any, tokens: Tokens) -> bool:
    """Whether the model prefers, and writes freely, exactly the target."""
    alone = oracle.greedy(model, tokens.prompt, len(tokens.target)) == list(tokens.target)
    return alone and not oracle.mistakes(model, tokens.prompt, tokens.target)


def answer(net: Net, prompt: str, length: int) -> tuple[int, ...]:
    return tuple(oracle.greedy(net.model, net.tokenizer(prompt)["input_ids"], length))


def breakable(net: Net, changes: dict[int, Change], scale: float = 1.0, length: int = 2) -> str:
    """A prompt whose answer the changes alter at this scale and leave at half of it."""
    whole, half = twin(net, changes, scale), twin(net, changes, scale / 2)
    for prompt in (a + b for a in "abcdefghij" for b in "aeiou(= "):
        ids = net.tokenizer(prompt)["input_ids"]
        before = answer(net, prompt, length)
        if 1 not in before and oracle.greedy(half, ids, length) == list(before) != oracle.greedy(whole, ids, length):
            return prompt
    raise AssertionError("no prompt whose answer changes")


def sound(result: Repair, net: Net, untouched: State) -> None:
    """The net holds exactly the patch, and what it calls repaired is; without a patch nothing was changed."""
    for outcome in result.outcomes:
        assert bool(outcome.reason) != outcome.repaired
        if outcome.failing:
            assert says(net.model, outcome.tokens) == outcome.repaired
    assert (result.patch is None) == (result.repaired == 0)
    if result.patch is not None:
        assert result.gate is not None
        assert result.patch.made.gate == result.gate.data()
        assert [item.repaired for item in result.patch.items] == [outcome.repaired for outcome in result.outcomes]
        result.patch.revert(net)
    assert not untouched.changed(net)


# --- each condition alone ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", oracle_models.KINDS)
def test_a_patch_that_does_nothing_it_must_not_passes_as_it_was_solved(kind: str) -> None:
    net, free = oracle_models.net(kind), oracle_models.net(kind)
    untouched = State.of(net)
    result = repair(net, FAILURES[:3], STAR, ONE, gate=Gate(1e6, (ONE, TWO)), drift="full")
    plain = repair(free, FAILURES[:3], STAR, ONE)
    assert result.gate is not None
    assert plain.gate is None
    assert (result.gate.scale, result.gate.solves, result.gate.weighed, result.gate.refused) == (1.0, 1, 1, ())
    assert result.patch is not None
    assert plain.patch is not None
    assert not plain.patch.made.gate
    assert all(torch.equal(net.columns(layer), free.columns(layer)) for layer in range(net.layers))
    for reference in (ONE, TWO):
        expected = kl(oracle_models.net(kind), dict(plain.patch.changes), 1.0, reference)
        assert result.gate.kl[reference.name] == pytest.approx(expected, rel=1e-3)
    assert list(result.gate.kl.values()) == sorted(result.gate.kl.values(), reverse=True)
    sound(result, net, untouched)


def test_kl_above_the_limit_shrinks_the_patch_to_the_largest_scale_below_it() -> None:
    net = oracle_models.net()
    untouched = State.of(net)
    changes = solved(net, FAILURES[:1])
    most = kl(net, changes, 0.97, ONE)
    result = repair(net, FAILURES[:1], STAR, ONE, gate=Gate(most, (ONE,)))
    assert result.gate is not None
    assert result.repaired == 1
    assert result.gate.refused[0].startswith("KL is")
    assert result.gate.scale == pytest.approx(0.97, abs=RESOLUTION)
    assert result.drift is not None
    assert kl(net_of(untouched), changes, result.gate.scale, ONE) == pytest.approx(result.drift.kl, rel=1e-3)
    assert result.drift.kl <= most
    sound(result, net, untouched)


def net_of(_: State) -> Net:
    return oracle_models.net()


def test_the_worst_kind_of_reference_counts() -> None:
    net = oracle_models.net()
    changes = solved(net, FAILURES[:1])
    sizes = {reference: kl(net, changes, 1.0, reference) for reference in (ONE, TWO)}
    mild, bad = sorted(sizes, key=lambda reference: sizes[reference])
    limit = math.sqrt(sizes[mild] * sizes[bad])
    assert sizes[mild] < limit < sizes[bad]
    passed = repair_with(Gate(limit, (mild,)))
    assert passed.refused == ()
    refused = repair_with(Gate(limit, (mild, bad)))
    assert bad.name in refused.refused[0]


def repair_with(gate: Gate, failures: list[Failure] | None = None) -> Any:
    return repair(oracle_models.net(), failures or FAILURES[:1], STAR, ONE, gate=gate).gate


def test_what_no_scale_allows_is_not_repaired_and_the_net_is_as_it_was() -> None:
    net = oracle_models.net()
    untouched = State.of(net)
    result = repair(net, FAILURES, STAR, ONE, gate=Gate(1e-9, (ONE,)))
    assert result.gate is not None
    assert (result.patch, result.drift, result.repaired, result.gate.scale) == (None, None, 0, 0.0)
    assert set(result.gate.dropped) == {outcome.tokens.id for outcome in result.outcomes if outcome.failing}
    for outcome in result.outcomes:
        assert "at most 1e-09 allowed" in outcome.reason
        assert outcome.after == outcome.before
    sound(result, net, untouched)


@pytest.mark.parametrize("told", [True, False])
def test_a_protected_prompt_comes_out_as_before(told: bool) -> None:
    net = oracle_models.net()
    untouched = State.of(net)
    prompt = breakable(net, solved(net, FAILURES[:2]))
    before = answer(net, prompt, 2)
    failure = Failure(prompt, str(net.tokenizer.decode(list(before))) if told else "", "kept")
    if told and net.tokenize([failure])[0].target != before:
        pytest.fail("the answer does not survive its text; choose another seed")
    free = repair(net, FAILURES[:2], STAR, ONE)
    assert free.patch is not None
    assert answer(net, prompt, 2) != before
    free.patch.revert(net)
    result = repair(net, FAILURES[:2], STAR, ONE, gate=Gate(math.inf, (), (Protected(failure, 2),)))
    assert result.gate is not None
    assert "1 of 1 protected prompts" in result.gate.refused[0]
    assert (result.gate.protected, result.gate.protected_unwatched) == (1, 0)
    assert answer(net, prompt, 2) == before
    assert result.repaired > 0
    sound(result, net, untouched)


def test_a_protected_target_that_was_not_given_before_is_not_watched() -> None:
    protect = (Protected(Failure("say again", " never", "no")), Protected(Failure("say again", "", "yes"), 3))
    result = repair_with(Gate(math.inf, (), protect))
    assert (result.protected, result.protected_unwatched) == (1, 1)


def test_earlier_repairs_hold_and_those_that_did_not_are_not_watched() -> None:
    """Two patches one after another: without memory the second breaks the first, with memory it does not."""
    net = oracle_models.net()
    untouched = State.of(net)
    forgets = [bold_star(learning_rate=rate, epochs=100) for rate in (0.1, 0.3, 1.0)]
    for failure, method in [(failure, method) for method in forgets for failure in [*MORE, *FAILURES[1:]]]:
        first = repair(net, FAILURES[:1], STAR, ONE).patch
        assert first is not None
        between = State.of(net)
        (item,) = first.items
        assert says(net.model, item.tokens)
        second = repair(net, [failure], method, ONE).patch
        broke = not says(net.model, item.tokens)
        if second is not None:
            second.revert(net)
        if broke and second is not None:
            result = repair(net, [failure], method, ONE, gate=Gate(math.inf, (), (), (first,)))
            assert result.gate is not None
            assert (result.gate.memory, result.gate.memory_unwatched) == (1, 0)
            assert says(net.model, item.tokens)
            assert result.repaired == 1
            assert [kept.tokens.id for kept in result.patch.items] == [failure.id]  # type: ignore[union-attr]
            sound(result, net, between)
            first.revert(net)
            loose = repair(net, [failure], method, ONE, gate=Gate(math.inf, (), (), (first,)))
            assert loose.gate is not None
            assert (loose.gate.memory, loose.gate.memory_unwatched, loose.gate.refused) == (0, 1, ())
            sound(loose, net, untouched)
            return
        first.revert(net)
    raise AssertionError("no repair breaks an earlier one; choose another seed")


def test_memory_is_checked_even_where_the_solve_does_not_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows to keep never reach the method, and a patch that would break an earlier repair is refused."""
    net = oracle_models.net()
    first = repair(net, FAILURES[:1], STAR, ONE).patch
    assert first is not None
    between = State.of(net)
    real = loop._attempt
    monkeypatch.setattr(loop, "_attempt", lambda *arguments: real(*arguments[:5]))
    wild, refused = bold_star(learning_rate=1.0, epochs=100), 0
    for failure in MORE:
        broke = repair(net, [failure], wild, ONE)
        lost = not says(net.model, first.items[0].tokens)
        if broke.patch is not None:
            broke.patch.revert(net)
        result = repair(net, [failure], wild, ONE, gate=Gate(math.inf, (), (), (first,)))
        assert says(net.model, first.items[0].tokens)
        assert result.gate is not None
        if broke.patch is not None and lost:
            assert "1 of 1 earlier repairs" in result.gate.refused[0]
            refused += 1
        sound(result, net, between)
    assert refused


def test_what_is_called_repaired_holds_in_greedy_text_at_the_scale_that_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Greedy text gives another answer as soon as the patch is not the one that was solved."""
    net = oracle_models.net()
    untouched = State.of(net)
    method = bold_star(learning_rate=0.1, epochs=100, margin=1.0)
    most = kl(net, solved(net, FAILURES[:2], method), 0.95, ONE)
    spoilt = net.tokenize(FAILURES[:1])[0]
    real, full = net.generate, []

    def generate(tokens: Any) -> Any:
        weights = net.columns(0).clone()
        if not full and untouched.changed(net):
            full.append(weights)
        other = bool(full) and not torch.equal(full[0], weights)
        made = real(tokens)
        return [(0, *text[1:]) if other and item == spoilt else text for item, text in zip(tokens, made, strict=True)]

    monkeypatch.setattr(writing, "assured", lambda *_: set())  # all is written token by token
    monkeypatch.setattr(net, "generate", generate)
    result = repair(net, FAILURES[:2], method, ONE, gate=Gate(most, (ONE,), solves=1))
    assert result.gate is not None
    assert 0 < result.gate.scale < 1
    assert [outcome.repaired for outcome in result.outcomes] == [False, True]
    assert "greedy decoding gives another text at the scale" in result.outcomes[0].reason
    assert result.gate.dropped == (spoilt.id,)
    assert result.patch is not None
    assert [item.repaired for item in result.patch.items] == [False, True]


@pytest.mark.parametrize("remembered", [True, False])
def test_what_must_stay_is_written_freely_too(remembered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy text differs from what reading shows, for what must stay and in any patched net only."""
    net = oracle_models.net()
    first = repair(net, FAILURES[:1], STAR, ONE).patch
    assert first is not None
    untouched = State.of(net)
    protect = () if remembered else (Protected(FAILURES[0]),)
    gate = Gate(math.inf, (), protect, (first,) if remembered else ())
    spoilt, real = first.items[0].tokens, net.generate

    def generate(tokens: Any) -> Any:
        patched = untouched.changed(net)
        made = zip(tokens, real(tokens), strict=True)
        return [(0, *text[1:]) if patched and item.prompt == spoilt.prompt else text for item, text in made]

    monkeypatch.setattr(writing, "assured", lambda *_: set())  # all is written token by token
    monkeypatch.setattr(net, "generate", generate)
    result = repair(net, FAILURES[1:3], STAR, ONE, gate=gate)
    assert result.gate is not None
    assert f"1 of 1 {'earlier repairs' if remembered else 'protected prompts'}" in result.gate.refused[0]
    sound(result, net, untouched)
    assert result.patch is None


# --- bisection and dropping -------------------------------------------------------------------------


def scan(passes: Callable[[float], bool], steps: int = 64) -> float:
    """The largest scale below which all pass."""
    last = 0.0
    for step in range(1, steps + 1):
        if not passes(step / steps):
            return last
        last = step / steps
    return last


@pytest.mark.parametrize("share", [0.05, 0.7])
def test_bisection_finds_the_scale_of_a_slow_scan(share: float) -> None:
    net = oracle_models.net()
    untouched = State.of(net)
    changes = solved(net, FAILURES[:2])
    limit = share * kl(net, changes, 1.0, ONE)
    guard = Guard.of(net, Gate(limit, (ONE,)), None, [])
    best, weighed = guard.largest(changes, Verdict(0.0), guard.weigh(changes, 1.0))
    assert not untouched.changed(net)
    expected = scan(lambda scale: kl(net, changes, scale, ONE) <= limit)
    assert best.passes
    assert expected - RESOLUTION <= best.scale <= expected + 1 / 64
    assert weighed <= math.log2(1 / RESOLUTION)


def test_bisection_of_a_protected_prompt_finds_the_scale_of_a_slow_scan() -> None:
    net = oracle_models.net()
    changes = solved(net, FAILURES[:2])
    prompt = breakable(net, changes, 0.8)
    ids, before = net.tokenizer(prompt)["input_ids"], list(answer(net, prompt, 2))
    guard = Guard.of(net, Gate(math.inf, (), (Protected(Failure(prompt, ""), 2),)), None, [])
    best, _ = guard.largest(changes, Verdict(0.0), Verdict(1.0, ("assumed",)))
    expected = scan(lambda scale: oracle.greedy(twin(net, changes, scale), ids, 2) == before)
    assert 0.4 <= expected < 0.8
    assert expected - RESOLUTION <= best.scale <= expected + 1 / 64


def test_the_scale_that_each_failure_needs() -> None:
    net = oracle_models.net()
    changes = solved(net, FAILURES[:2])
    tokens = net.tokenize(FAILURES[:2])
    for item, need in zip(tokens, needed_scales(net, changes, tokens), strict=True):
        holds = [step for step in range(1, GRID + 1) if not wrong(twin(net, changes, step / GRID), item)]
        expected = GRID
        while expected - 1 in holds:
            expected -= 1
        assert need == expected / GRID


def wrong(model: Any, item: Tokens) -> bool:
    return bool(oracle.mistakes(model, item.prompt, item.target))


def test_the_failure_that_contradicts_what_is_protected_is_left_out_and_the_others_are_repaired() -> None:
    """A chat renders to a prompt that begins as the protected one and wants another answer at its end."""
    net = oracle_models.net()
    untouched = State.of(net)
    kept = Failure("say it now", "", "kept")
    (before,) = (answer(net, kept.prompt, 3),)
    other = Failure("say it now", " xyz", "against")
    ids = net.tokenizer(kept.prompt)["input_ids"]
    with pytest.raises(FailuresError, match="'against' wants another answer than a protected prompt"):
        repair(net, [other], STAR, ONE, gate=Gate(math.inf, (), (Protected(kept, 3),)))
    near = Failure("Say it now", " xyz", "against")
    gate = Gate(math.inf, (), tuple(Protected(Failure(text, "", text), 3) for text in NEAR))
    result = repair(net, [*FAILURES[:3], near], bold_star(learning_rate=0.3, epochs=100), ONE, gate=gate)
    assert result.gate is not None
    assert result.gate.refused
    assert [outcome.repaired for outcome in result.outcomes[:3]] == [True] * 3
    assert answer(net, kept.prompt, 3) == before
    assert oracle.greedy(net.model, ids, 3) == list(before)
    sound(result, net, untouched)


NEAR = ["say it now", "Say it  now", "Say It now", "Say it noW", " Say it now"]


def test_dropping_for_kl_leaves_out_the_dearest_and_repairs_the_others() -> None:
    net = oracle_models.net()
    untouched = State.of(net)
    failures = [*FAILURES, *MORE]
    free = repair(net, failures, STEADY, ONE)
    assert free.patch is not None
    assert free.drift is not None
    assert free.repaired == len(failures)
    free.patch.revert(net)
    limit = free.drift.kl / 3
    result = repair(net, failures, STEADY, ONE, gate=Gate(limit, (ONE,)))
    assert result.gate is not None
    assert result.patch is not None
    assert 0 < result.repaired < len(failures)
    assert set(result.gate.dropped) == {outcome.tokens.id for outcome in result.outcomes if not outcome.repaired}
    assert all(outcome.reason.startswith("left out") for outcome in result.outcomes if not outcome.repaired)
    assert result.gate.kl[ONE.name] <= limit
    assert result.gate.solves <= Gate().solves
    fewer = repair(oracle_models.net(), failures, STEADY, ONE, gate=Gate(limit, (ONE,), solves=1))
    assert fewer.repaired == 0
    sound(result, net, untouched)


# --- nothing half-done, and what is refused ---------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at", [1, 2, 3, 5, 8])
def test_whatever_breaks_in_the_gate_the_net_is_as_it_was(
    at: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = oracle_models.net()
    net.model.train()
    untouched = State.of(net)
    real, calls = net.logits, []

    def logits(*arguments: Any) -> Any:
        calls.append(1)
        if armed and len(calls) == at:
            raise error
        return real(*arguments)

    armed = False

    def progress(stage: str, *_: int) -> None:
        nonlocal armed
        if stage == "gate" and not armed:
            armed = True
            calls.clear()

    monkeypatch.setattr(net, "logits", logits)
    protect = (Protected(Failure("say again", ""), 2),)
    with pytest.raises(error):
        repair(net, FAILURES[:2], STAR, ONE, progress, gate=Gate(1e-6, (ONE,), protect))
    assert armed
    assert not untouched.changed(net)


def test_alone_every_patch_has_to_pass_and_the_net_stays_untouched() -> None:
    net = oracle_models.net()
    untouched = State.of(net)
    sizes = [kl(net, solved(net, [failure]), 1.0, ONE) for failure in FAILURES]
    limit = sorted(sizes)[1] * 1.01
    for size, result in zip(sizes, repair_each(net, FAILURES, STAR, gate=Gate(limit, (ONE,))), strict=True):
        assert not untouched.changed(net)
        assert result.gate is not None
        assert (result.gate.scale == 1) == (size <= limit)
        assert (result.patch is None) == (result.gate.scale == 0)
        if result.patch is not None:
            with result.patch.on(net):
                assert says(net.model, result.outcomes[0].tokens)
                assert kl(oracle_models.net(), dict(result.patch.changes), 1.0, ONE) <= limit * 1.001


def test_alone_what_the_gate_has_measured_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it reads the texts of the record; the figures are those of a measurement of its own."""
    net, measured = oracle_models.net(), []
    real = Untouched.measure
    monkeypatch.setattr(Untouched, "measure", lambda *given: measured.append(1) or real(*given))
    made, _, drifts, _ = repair_alone(net, FAILURES[:2], STAR, ONE, None, quiet, Gate(9.0, (ONE,)), drift="full")
    assert len(measured) == len(drifts) == 2
    plain = repair_alone(net, FAILURES[:2], STAR, ONE, None, quiet, drift="full")
    assert (drifts, [one.drift for one in made]) == (plain[2], drifts)
    measured.clear()
    repair_alone(net, FAILURES[:2], STAR, ONE, None, quiet, Gate(9.0, (TWO,)))
    assert len(measured) == 4
    unlimited = repair_alone(net, FAILURES[:2], STAR, ONE, None, quiet, OPEN, drift="full")  # a gate that measures none
    assert unlimited[2] == drifts


def test_a_patch_keeps_the_gates_record_and_older_files_have_none(tmp_path: Path) -> None:
    net = oracle_models.net()
    made = repair(net, FAILURES[:1], STAR, ONE, gate=OPEN).patch
    assert made is not None
    made.save(tmp_path / "p")
    found = Patch.load(tmp_path / "p").made.gate
    assert found == made.made.gate
    assert (found["max_kl"], found["scale"]) == (None, 1.0)
    made.revert(net)
    plain = repair(net, FAILURES[:1], STAR, ONE).patch
    assert plain is not None
    assert b"refused" not in plain.serialise()
    plain.save(tmp_path / "q")
    assert Patch.load(tmp_path / "q").made.gate == {}


def test_memory_of_another_model_is_refused() -> None:
    net, other = oracle_models.net(), oracle_models.net(seed=1)
    patch = repair(other, FAILURES[:1], STAR, ONE).patch
    assert patch is not None
    untouched = State.of(net)
    with pytest.raises(WrongModelError, match="this is another model; leave the patch out, or load the model"):
        repair(net, FAILURES[1:2], STAR, ONE, gate=Gate(memory=(patch,)))
    half = oracle_models.net(seed=1, dtype=torch.bfloat16)
    with pytest.raises(WrongModelError, match="in float32, the model is in bfloat16; load it with dtype float32"):
        repair(half, FAILURES[1:2], STAR, ONE, gate=Gate(memory=(patch,)))
    with pytest.raises(FailuresError, match="'new' wants another answer than an earlier repair in memory"):
        repair(other, [Failure(FAILURES[0].prompt, " no", "new")], STAR, ONE, gate=Gate(memory=(patch,)))
    assert not untouched.changed(net)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_limit_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(UsageError, match="expected nats per token above 0, or inf"):
        Gate(value)


BAD = {
    "no file": (None, "no such file"),
    "broken": (b'{"prompt": "a"}\n{"prompt": \n', "line 2: broken JSON"),
    "no prompt": (b'{"prompt": "a"}\n\n{"promt": "a"}\n', "line 3: unknown key 'promt' (did you mean 'prompt'?)"),
    "target": (b'{"prompt": "a", "target": 3}\n', "line 1: target is a number"),
    "empty target": (b'{"prompt": "a", "target": ""}\n', "line 1: the target is empty"),
    "length": (b'{"prompt": "a", "length": 0}\n', "line 1: length is 0; expected how many tokens"),
    "length kind": (b'{"prompt": "a", "length": "3"}\n', "line 1: length is text; expected how many tokens"),
    "both": (b'{"prompt": "a", "target": "b", "length": 3}\n', "line 1: both target and length"),
    "empty": (b"\n", "no prompts in it"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_of_protected_prompts(case: str, tmp_path: Path) -> None:
    content, said = BAD[case]
    path = tmp_path / "protect.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FailuresError) as error:
        read_protected(path)
    assert said in str(error.value)


def test_protected_prompts_are_read_with_the_template(tmp_path: Path) -> None:
    path = tmp_path / "protect.jsonl"
    path.write_text('{"prompt": "a", "target": "b"}\n{"prompt": "c", "length": 3}\n{"prompt": "d"}\n', encoding="utf-8")
    told, three, free = read_protected(path, "# {prompt}\n{target};", length=7)
    assert (told.failure.prompt, told.failure.target) == ("# a\n", "b;")
    assert (three.failure.prompt, three.failure.target, three.length) == ("# c\n", "", 3)
    assert (free.failure.id, free.length) == ("3", 7)


# --- the command line -------------------------------------------------------------------------------


def test_the_commands_gate(run: Run) -> None:
    for name, row in zip("ab", ROWS, strict=True):
        write(Path(f"{name}.jsonl"), row)
    Path("text.txt").write_text("for name in names:\n    print(name)\n", encoding="utf-8")
    code, out, _ = run("repair", "a.jsonl", "--json")
    first = json.loads(out)
    assert code == 0
    assert first["gate"]["max_kl"] == pytest.approx(0.1)
    assert max(first["gate"]["kl"].values()) == next(iter(first["gate"]["kl"].values())) > first["drift"]["kl"]
    code, out, _ = run("show", "a.patch.safetensors", "--json")
    assert json.loads(out)["gate"] == first["gate"]

    code, out, _ = run(
        "repair", "a.jsonl", "--reference", "text.txt", "--max-kl", "1e-7", "--output", "none.safetensors"
    )
    assert code == 1
    assert "gate       KL at most 1e-07 nats/token" in out
    assert "nothing is kept, 1 failure left out" in out
    assert not Path("none.safetensors").exists()

    code, out, _ = run(
        "repair", "a.jsonl", "--reference", "text.txt", "--max-kl", "inf", "--output", "free.safetensors", "--json"
    )
    assert (json.loads(out)["gate"]["max_kl"], json.loads(out)["gate"]["kl"]) == (None, {})
    for flags in (["--method", "star", "--preset", "paper"], ["--alone", "--output", "folder"]):
        assert json.loads(run("repair", "a.jsonl", "--reference", "text.txt", *flags, "--json")[1])["gate"] is None

    Path("protect.jsonl").write_text('{"prompt": "import os\\n\\npath = os."}\n', encoding="utf-8")
    assert run("apply", "a.patch.safetensors", "--model", MODEL, "--output", "patched")[0] == 0
    flags = ["--memory", "a.patch.safetensors", "--protect", "protect.jsonl", "--own-texts", "4"]
    code, out, _ = run("repair", "b.jsonl", "--reference", "text.txt", "--model", "patched", *flags, "--json")
    gate = json.loads(out)["gate"]
    assert (gate["protected"], gate["memory"], gate["memory_unwatched"]) == (1, 1, 0)
    assert run("apply", "b.patch.safetensors", "--model", "patched", "--output", "twice")[0] == 0
    assert json.loads(run("diagnose", "a.jsonl", "--model", "twice", "--json")[1])["failing"] == 0

    code, _, err = run("repair", "b.jsonl", "--memory", "a.jsonl")
    assert code == 2
    assert "a.jsonl: not a patch" in err
    code, out, _ = run(
        "repair", "b.jsonl", "--reference", "text.txt", "--alone", "--max-kl", "1e-7", "--output", "folder2", "--json"
    )
    assert (code, json.loads(out)["gate"]["refused"][0][:5]) == (1, "KL is")


MODEL = shipped("model")


def test_factors_are_scaled_as_deltas_are() -> None:
    """What is weighed at a scale is, bit for bit, what is made at it, and half of what was solved."""
    net = oracle_models.net()
    before = State.of(net)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(2, size, generator=generator) for size in (oracle_models.WIDTH, oracle_models.HIDDEN))
    with Trial(net, net.every_site()) as trial:
        changes = trial.changes({1: Product.of(0.02 * left, right)})
    (made,) = Scaled(changes, 0.5).made(net).values()
    assert isinstance(made, LowRank)
    assert isinstance(whole := changes[1].delta, Product)
    assert torch.allclose(2 * made.product.dense(), whole.dense(), atol=1e-4 * float(whole.dense().abs().max()))
    original = net.columns(1).clone()
    with Scaled(changes, 0.5).on(net):
        assert same_bits(net.columns(1), patched(original, made.delta))
        assert same_bits(made.original(net.columns(1)), original)
    assert not before.changed(net)
    assert Scaled(changes, 1.0).made(net) is changes
    needs = needed_scales(net, changes, net.tokenize(FAILURES[:1]))
    assert len(needs) == 1
