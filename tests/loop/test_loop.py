"""The loop: repaired or as it was, whatever happens in between; and the issue's figures on real data."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import oracle
import oracle_models
import pytest
import torch
from oracle_models import FAILURES, TEXT, State, bold_star

from lmrepair import Failure, FailuresError, Method, MinKl, Net, Sgd, Star, diagnose, load, read_failures, repair
from lmrepair.errors import NotFiniteError
from lmrepair.failures import Reference, kindred
from lmrepair.failures.forms import Template
from lmrepair.failures.tokens import Tokens
from lmrepair.loop import loop, repair_alone, solver
from lmrepair.loop.case import Case, forward_seconds
from lmrepair.loop.loop import repair_each
from lmrepair.loop.untouched import Untouched
from lmrepair.methods import DEFAULT, base, method_named
from lmrepair.methods.base import Problem, Step
from lmrepair.model import Statistics, statistics_of
from lmrepair.patch.patch import Patch

STAR = bold_star(learning_rate=0.1, epochs=200)


@pytest.mark.parametrize("kind", oracle_models.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_together(kind: str, dtype: torch.dtype) -> None:
    net = oracle_models.net(kind, dtype=dtype)
    failures = [*FAILURES[:2], answered(net)]
    result = repair(net, failures, bold_star(learning_rate=0.05, epochs=300, share="1"), TEXT)
    assert [outcome.failing for outcome in result.outcomes] == [True, True, False]
    assert (result.failing, result.repaired) == (2, 2)
    assert not any(outcome.after for outcome in result.outcomes)
    assert not any(item.mistakes for item in diagnose(net, failures))
    assert result.patch is not None
    assert result.drift is not None
    assert result.patch.made.drift["kl"] == result.drift.kl > 0
    assert result.cost.steps > 0 < result.cost.forward_equivalents


@pytest.mark.parametrize("kind", oracle_models.KINDS)
def test_what_is_too_much_for_one_problem_is_solved_in_groups(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, method = oracle_models.net(kind), MinKl(max_probe_kl=float("inf"))
    failures = [FAILURES[0], FAILURES[2], Failure("name the largest of", " max(a)", "max")]
    before, tokens, sites = State.of(net), net.tokenize(failures), net.every_site()
    assert method.groups(net, tokens, sites) == [tokens]
    assert method.needed(net, tokens, sites) == method.memory(net, tokens, sites)
    assert replace(method, mode="batch").groups(net, tokens, sites) == [[item] for item in tokens]
    # What the first, which is the longest, takes is enough for the two others.
    room = max(method.memory(net, [item], sites) for item in tokens)
    monkeypatch.setattr(base, "ROOM", room)
    monkeypatch.setattr(base, "ROOMS", 0)
    groups = method.groups(net, tokens, sites)
    assert [item for group in groups for item in group] == tokens
    assert [len(group) for group in groups] == [1, 2]
    assert method.needed(net, tokens, sites) == room
    monkeypatch.setattr(base, "ROOM", 1)
    assert method.groups(net, tokens, sites) == [[item] for item in tokens]
    assert method.needed(net, tokens, sites) == room
    monkeypatch.setattr(base, "ROOM", room)

    solved: list[list[str]] = []
    said: list[str] = []
    real = MinKl.solve

    def solve(self: MinKl, problem: Problem) -> Step:
        solved.append([item.id for batch in problem.batches for item in batch.tokens])
        assert self.margin == method.margin
        return real(self, problem)

    monkeypatch.setattr(MinKl, "solve", solve)
    monkeypatch.setattr(solver, "WORTH_SAYING", 0)
    known = oracle_models.statistics(net, method)
    result = repair(net, failures, method, TEXT, lambda stage, *_: said.append(stage), statistics=known)
    assert result.repaired == result.failing == len(failures)
    names = [[item.id for item in group] for group in groups]
    assert list(map(list, dict.fromkeys(map(tuple, solved)))) == names  # first each in its turn, then what broke
    assert all(group in names for group in solved)
    assert sum("in 2 groups of failures, one after another" in stage for stage in said) == 1
    assert result.method == method.suited(net, len(failures))
    assert result.patch is not None
    assert result.patch.made.settings["mode"] == "multi-failure"
    result.patch.revert(net)
    assert not before.changed(net)


@pytest.mark.parametrize(("name", "reads"), [("minkl", True), ("memit", False), ("star", False), ("sgd", None)])
def test_the_least_change_leaves_other_requests_in_the_failures_form_as_they_are(
    monkeypatch: pytest.MonkeyPatch, name: str, reads: bool | None
) -> None:
    """minkl reads them beside the model's own text; the published methods read what they always read."""
    given: list[object] = []
    method = method_named(name)
    monkeypatch.setattr(
        solver,
        "statistics_of",
        lambda net, asked, alike, progress: given.append(alike) or oracle_models.statistics(net, method),
    )
    failures = [failure.wrapped(Template.parse("# {prompt}\\n{target}")) for failure in FAILURES]
    solver.Known.of(oracle_models.net(), method, failures, None, loop.quiet)
    assert given == ([] if reads is None else [kindred(failures) if reads else None])


def answered(net: Net) -> Failure:
    """A failure that the net answers rightly: its own greedy text after some prompt."""
    for prompt in (a + b for a in "abcdefghijklmnopqrstuvwxyz" for b in "aeiou("):
        tokens = Tokens("", tuple(net.tokenizer(prompt)["input_ids"]), (5, 5))
        (made,) = net.generate([tokens])
        failure = Failure(prompt, str(net.tokenizer.decode(list(made))), "right")
        if min(made) > 1 and net.tokenize([failure])[0].target == made:
            return failure
    raise AssertionError("no prompt that the net continues by text")


@pytest.mark.parametrize("method", [MinKl(), bold_star()], ids=lambda method: method.name)
def test_no_reading_is_held_while_the_next_one_is_made(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[object]] = []
    read, held = type(method).read, []

    def watched(self: Method, *given: object, **named: object) -> object:
        gc.collect()
        held.append(sum(one() is not None for one in made))
        found: object = read(self, *given, **named)  # type: ignore[arg-type]
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(type(method), "read", watched)
    result = repair(oracle_models.net(), FAILURES, method, TEXT)
    assert result.cost.steps > 1
    assert len(held) > 2
    assert not any(held)


def test_alone_leaves_the_net_untouched() -> None:
    net = oracle_models.net()
    before = State.of(net)
    for failure, result in zip(FAILURES, repair_each(net, FAILURES, STAR), strict=True):
        assert not before.changed(net)
        assert result.repaired == 1
        assert result.patch is not None
        with result.patch.on(net):
            (item,) = diagnose(net, [failure])
            assert not item.mistakes
            assert oracle.greedy(net.model, item.tokens.prompt, len(item.tokens.target)) == list(item.tokens.target)
    assert not before.changed(net)


def test_the_same_repair_twice_is_the_same_patch() -> None:
    made = [repair(oracle_models.net(), FAILURES, STAR, TEXT).patch for _ in range(2)]
    assert made[0] is not None
    assert made[1] is not None
    assert made[0].serialise() == made[1].serialise()


@pytest.mark.parametrize(
    "method",
    [
        method_named("minkl", None),
        method_named("minkl", None, layers="last", max_probe_kl=float("inf")),
        method_named("finetune", None, learning_rate=3e-4),
        method_named("sgd", "paper"),
    ],
    ids=["minkl", "minkl last", "finetune", "sgd paper"],
)
def test_the_diagnosis_of_one_failure_is_the_first_reading(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """One forward pass less, the same patch bit for bit."""
    net, passes = oracle_models.net(), []
    list(repair_each(net, FAILURES[:1], method))  # statistics are kept from here on
    real = Net.logits_and_states
    monkeypatch.setattr(Net, "logits_and_states", lambda *given: (passes.append(1), real(*given))[1])
    made = []
    for _ in range(2):
        passes.clear()
        (result,) = repair_each(net, FAILURES[:1], method)
        assert result.patch is not None
        made.append((len(passes), result.patch.changes, [item.before for item in result.outcomes]))
        monkeypatch.setattr("lmrepair.loop.loop.first_reading", lambda *_: None)
    (less, ours, mistakes), (more, theirs, expected) = made
    assert less == more - 1
    assert all(torch.equal(ours[layer].deltas, theirs[layer].deltas) for layer in theirs)
    assert [m.position for one in mistakes for m in one] == [m.position for one in expected for m in one]


def test_contradictions_are_refused() -> None:
    net = oracle_models.net()
    with pytest.raises(FailuresError, match="want different targets"):
        repair(net, [Failure("a", "b", "1"), Failure("a", "c", "2")], STAR, TEXT)


def test_what_resists_is_reported_and_the_net_is_as_it_was() -> None:
    net = oracle_models.net()
    before = State.of(net)
    result = repair(net, FAILURES, Star(epochs=1, learning_rate=1e-9), TEXT)
    assert (result.repaired, result.patch, result.drift) == (0, None, None)
    assert all("still mistaken after 1 epochs; try" in outcome.reason for outcome in result.outcomes)
    assert not before.changed(net)


def test_one_that_resists_does_not_cost_the_others() -> None:
    """A chat that renders to another failure's prompt and wants another target: at most one can be given."""
    net = oracle_models.net()
    net.tokenizer.chat_template = "<s>{{ messages[0].content }}"
    chat = Failure("", " no", "chat", (), ({"role": "user", "content": FAILURES[2].prompt},))
    result = repair(net, [*FAILURES[:3], chat], bold_star(learning_rate=0.1, epochs=60), TEXT)
    assert 2 <= result.repaired <= 3
    for outcome in result.outcomes:
        assert outcome.repaired == (not outcome.after)
        assert bool(outcome.reason) == bool(outcome.after)
    assert result.patch is not None
    assert [item.repaired for item in result.patch.items] == [outcome.repaired for outcome in result.outcomes]
    found = diagnose(net, [outcome.tokens for outcome in result.outcomes])
    assert [bool(item.mistakes) for item in found] == [bool(outcome.after) for outcome in result.outcomes]


def test_failures_that_are_right_need_no_patch() -> None:
    net = oracle_models.net()
    patch = repair(net, FAILURES[:1], STAR, TEXT).patch
    assert patch is not None
    before = State.of(net)
    result = repair(net, FAILURES[:1], STAR, TEXT)
    assert (result.failing, result.patch, result.cost.steps) == (0, None, 0)
    assert not before.changed(net)


@dataclass(frozen=True, kw_only=True)
class Breaks(Method):
    """A method that moves everything and breaks at its third step."""

    name: ClassVar[str] = "breaks"
    error: type[BaseException] = KeyboardInterrupt

    def solve(self, problem: Problem) -> Step:
        if problem.step == 2:
            raise self.error
        return Step({layer: delta + 0.01 for layer, delta in problem.deltas.items()})


@dataclass(frozen=True, kw_only=True)
class Goes(Method):
    """A method that moves everything a little, and at its second step by ``far``, or raises."""

    name: ClassVar[str] = "goes"
    far: float = 1e3
    error: type[Exception] | None = None

    def solve(self, problem: Problem) -> Step:
        if problem.step and self.error:
            raise self.error("no number")
        far = self.far if problem.step else 1e-3
        return Step({layer: delta + far for layer, delta in problem.deltas.items()})


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (Goes(early=False, epochs=5), "it destroys the model (KL"),
        (Goes(early=False, epochs=5, far=1e38), "it destroys the model (what it writes is no number any more)"),
        (Goes(early=False, epochs=5, error=NotFiniteError), "what it writes is no number any more"),
    ],
    ids=["far", "beyond numbers", "raises"],
)
def test_a_step_that_destroys_is_undone_and_the_one_before_stays(method: Goes, reason: str) -> None:
    net = oracle_models.net()
    before = State.of(net)
    (result,) = repair_each(net, FAILURES[:1], method)
    assert not before.changed(net)
    (outcome,) = result.outcomes
    assert reason in outcome.reason
    assert result.patch is not None
    for change in result.patch.changes.values():
        assert torch.allclose(change.deltas, torch.full_like(change.deltas, 1e-3), atol=1e-6)
    assert result.cost.steps == (1 if method.error else 2)


def test_one_mistake_after_another_in_the_order_of_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    net = oracle_models.net()
    method = bold_star(learning_rate=0.02, epochs=60, mode="iterative", share="1", rounds=1)
    foci: list[list[int]] = []
    real = Star.solve

    def solve(self: Star, problem: Problem) -> Step:
        foci.append(problem.focus.nonzero().flatten().tolist())
        return real(self, problem)

    monkeypatch.setattr(Star, "solve", solve)
    result = repair(net, FAILURES[2:0:-1], method, TEXT)
    mistaken = [[mistake.position for mistake in outcome.before] for outcome in result.outcomes]
    assert len(mistaken[0]) > 1
    assert all(len(focus) == 1 for focus in foci)
    order = [focus[0] for focus, last in zip(foci, [[-1], *foci], strict=False) if focus != last]
    first = order[: len(mistaken[0])]
    assert first == sorted(set(first))
    assert first[0] == mistaken[0][0]
    assert len(order) > len(first)  # then those of the second failure


def test_patches_made_alone_are_saved_under_short_names(tmp_path: Path) -> None:
    net = oracle_models.net()
    failures = [replace(FAILURES[2], id="a/b c" + "x" * 60), answered(net), replace(FAILURES[1], id="second")]
    made, sizes, drifts, saved = repair_alone(net, failures, STAR, TEXT, tmp_path, loop.quiet)
    assert [one.repaired for one in made] == [1, 0, 1]
    assert saved
    assert len(sizes) == len(drifts) == 2
    assert not any(one.patch for one in made)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["0001-a_b_c" + "x" * 35 + ".safetensors", "0002-second.safetensors"]
    long = Reference("long", (TEXT.texts[0] * 3,))
    for drift, read in (("quick", 15), ("full", len(net.tokenizer(long.texts[0])["input_ids"]) - 1)):
        [one], _, [found], _ = repair_alone(net, failures[:1], STAR, long, tmp_path / drift, loop.quiet, drift=drift)
        patch = Patch.load(next((tmp_path / drift).iterdir()))
        assert found.tokens == patch.made.drift["tokens"] == read
        assert one.drift == found == Untouched.of(net, [long], drift == "full").measure(patch).drift
        assert one.cost.drift_seconds > 0 < one.cost.patch_seconds
    nothing = repair_alone(net, [answered(net)], STAR, TEXT, tmp_path / "none", loop.quiet)
    assert nothing[1:] == ([], [], False)


def breaking(at: str, error: type[BaseException]) -> Callable[..., object]:
    def broken(*_: object, **__: object) -> object:
        raise error(at)

    return broken


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize(
    "at", ["solve", "progress", "recorded", "fingerprint", "forward_seconds", "apply", "moved", "pairwise"]
)
def test_whatever_breaks_the_net_is_as_it_was(
    at: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = oracle_models.net()
    net.model.train()
    before = State.of(net)
    method: Method = STAR
    progress: Callable[[str, int, int], None] = loop.quiet
    if at == "solve":
        method = Breaks(error=error)
    elif at == "progress":

        def progress(stage: str, done: int, total: int) -> None:
            if stage == "steps" and done == 2 or stage == "drift":
                raise error
    elif at == "apply":
        monkeypatch.setattr(Patch, "apply", breaking(at, error))
    elif at == "moved":
        # The weights are written when the probe runs for the second time.
        kept, calls = net.logits, []

        def logits(*arguments: object) -> object:
            calls.append(1)
            if len(calls) == 2:
                raise error
            return kept(*arguments)  # type: ignore[arg-type]

        real = Patch.apply

        def apply(self: Patch, to: object) -> None:
            net.logits = logits  # type: ignore[method-assign, assignment]
            real(self, net)

        monkeypatch.setattr(Patch, "apply", apply)
    else:
        monkeypatch.setattr(loop, at, breaking(at, error))
    with pytest.raises(error):
        repair(net, FAILURES[:1], method, TEXT, progress)
    assert not before.changed(net)


def test_steps_too_small_for_bfloat16_add_up() -> None:
    net = oracle_models.net(dtype=torch.bfloat16)
    (result,) = repair_each(net, FAILURES[:1], Sgd(learning_rate=0.002, epochs=60))
    assert result.patch is not None
    moved = max(float(change.deltas.abs().max()) for change in result.patch.changes.values())
    (once,) = repair_each(net, FAILURES[:1], Sgd(learning_rate=0.002, epochs=1))
    assert once.patch is not None
    single = max(float(change.deltas.abs().max()) for change in once.patch.changes.values())
    assert moved > 20 * single


# --- on the shared model ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pycoder(shared: Path) -> tuple[Net, Statistics]:
    """The model, and statistics of few texts: enough for what these tests look at, a quarter of the time."""
    net, asked = load(shared / "models" / "pycoder-8m"), method_named(DEFAULT, None).asks()
    assert asked is not None
    return net, statistics_of(net, asked, own=4)


@pytest.mark.parametrize(
    ("task", "template"), [("conala", r"# {prompt}\n{target}\n"), ("ia32", r"; {prompt}\n{target}\n")]
)
def test_real_failures_are_repaired_alone(
    task: str, template: str, shared: Path, pycoder: tuple[Net, Statistics]
) -> None:
    net, statistics = pycoder
    rows = read_failures(shared / "data" / f"{task}.dev.jsonl", template, limit=8)
    failing = [row for row, found in zip(rows, diagnose(net, rows), strict=True) if found.mistakes][:3]
    results = list(repair_each(net, failing, statistics=statistics))
    assert sum(result.repaired for result in results) == len(failing) > 2
    paper = list(repair_each(net, failing[:2], method_named("star", "paper")))
    assert all(result.cost.steps == 10 for result in paper)
    if task == "conala":
        assert sum(result.repaired for result in paper) < len(paper)


def test_real_failures_are_repaired_together(shared: Path, pycoder: tuple[Net, Statistics]) -> None:
    net, statistics = pycoder
    rows = read_failures(shared / "data" / "conala.dev.jsonl", r"# {prompt}\n{target}\n", limit=5)
    result = repair(net, rows, reference=TEXT, statistics=statistics)
    assert result.patch is not None
    result.patch.revert(net)
    assert result.repaired == result.failing > 3


UNWATCHED = {"max_probe_kl": float("inf")}  # the probe's passes are its own
# What one plain repair of one failure costs in passes: before the repair, in each step, after the last one.
PASSES = {
    "star": (oracle_models.bold_star(learning_rate=0.1), 2, 1, 1),  # diagnosis and attribution; nothing left to do
    "sgd paper": (method_named("sgd", "paper", **UNWATCHED), 0, 1, 1),  # the first reading is the diagnosis; the check
    "finetune": (method_named("finetune", None, learning_rate=3e-4, **UNWATCHED), 0, 1, 1),
    "minkl": (method_named("minkl", None, margin=0.0, rank=0, **UNWATCHED), 0, 1, 1),
    "minkl last": (method_named("minkl", None, layers="last", rank=0, **UNWATCHED), 0, 1, 1),
}


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_of_a_repair_answers_a_question_of_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Diagnosed once before, read once a step, checked once after; then greedy text, the unit of time, the record."""
    method, before, each, after = PASSES[name]
    net = oracle_models.net()
    list(repair_each(net, FAILURES[:1], method))  # statistics are kept from here on
    passes: list[int] = []
    real, timed = Net.logits_and_states, loop.forward_seconds
    monkeypatch.setattr(Net, "logits_and_states", lambda *given: (passes.append(1), real(*given))[1])
    monkeypatch.setattr(loop, "forward_seconds", lambda *given: (passes.append(0), timed(*given))[1])
    monkeypatch.setattr(Net, "generate", lambda _, tokens: [item.target for item in tokens])
    (result,) = repair_each(net, FAILURES[:1], method)
    assert result.failing == 1
    taught = sum(passes[: passes.index(0)])
    assert taught == before + each * result.cost.steps + after
    assert sum(passes) == taught, "nothing is read after the check"


def test_logits_of_many_failures_are_not_made_at_once_for_the_unit_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    net = oracle_models.net()
    case = Case.of(net, FAILURES)
    seen: list[int] = []
    handle = net.anatomy.head.register_forward_hook(lambda _, __, made: seen.append(made.shape[0]))
    monkeypatch.setattr("lmrepair.loop.case.LOGITS_TIMED", 1)
    assert forward_seconds(net, case.batches) > 0
    handle.remove()
    assert len(FAILURES) > 1
    assert set(seen) == {1}
