"""Repairs one after another: what is measured is the net of that moment, and the net comes back."""

from __future__ import annotations

import copy

import oracle
import oracle_models
import pytest
from oracle_models import FAILURES, State, bold_star

import lmrepair.bench.cells.in_turn as module
from lmrepair import Failure, FailuresError, Reference, Sgd, UsageError, evaluate, repair, repair_each
from lmrepair.bench.cells.in_turn import cumulative
from lmrepair.model.statistics import windows

ONE = Reference("one", ("for i in range(10):\n    print(i)\n", "the quick brown fox"))
TWO = Reference("two", ("select name from persons;", "{}"))
STAR = bold_star(learning_rate=0.1, metric="identity")  # whatever a model is by now: no statistics of it


@pytest.mark.parametrize("kind", oracle_models.KINDS)
def test_the_curve_is_that_of_repairs_by_hand(kind: str) -> None:
    net = oracle_models.net(kind)
    untouched = State.of(net)
    found = cumulative(net, FAILURES[:3], STAR, FAILURES[3:], [ONE, TWO], every=2)
    assert not untouched.changed(net)
    assert [point.repairs for point in found.points] == [2, 3]
    assert (found.start.repairs, found.start.holding) == (0, 1.0)
    assert found.start.held_out == evaluate(net, FAILURES[3:])
    assert all(drift.kl == pytest.approx(0, abs=1e-12) for drift in found.start.drift.values())

    hand, repaired = oracle_models.net(kind), []
    before = copy.deepcopy(hand.model)
    points = dict(zip((2, 3), found.points, strict=True))
    for number, failure in enumerate(FAILURES[:3], start=1):
        result = repair(hand, [failure], STAR, ONE)
        repaired += [failure] * result.repaired
        if number in points:
            point = points[number]
            holding = [evaluate(hand, [one]).greedy_match for one in repaired]
            assert point.repaired == len(repaired)
            assert point.holding == pytest.approx(sum(map(float, holding)) / len(repaired))  # type: ignore[arg-type]
            assert point.held_out == evaluate(hand, FAILURES[3:])
            for reference in (ONE, TWO):
                kl, *_ = oracle.drift(before, hand.model, [item.ids for item in windows(hand, reference.texts)])
                assert point.drift[reference.name].kl == pytest.approx(kl, rel=1e-3)
            kls = [drift.kl for drift in point.drift.values()]
            assert kls == sorted(kls, reverse=True)
    assert [outcome.failure for outcome in found.outcomes] == FAILURES[:3]


def test_the_joint_solve_beside_it() -> None:
    net = oracle_models.net()
    found = cumulative(net, FAILURES[:3], STAR, FAILURES[3:], [ONE], every=5)
    assert [point.repairs for point in found.points] == [3]
    assert found.joint is not None
    together = oracle_models.net()
    result = repair(together, FAILURES[:3], STAR, ONE, drift="full")
    assert found.joint.repaired == result.repaired
    assert found.joint.held_out == evaluate(together, FAILURES[3:])
    assert result.drift is not None
    assert found.joint.drift["one"].kl == pytest.approx(result.drift.kl, rel=1e-6)
    assert cumulative(net, FAILURES[:1], STAR, joint=False).joint is None


def test_what_is_right_at_its_turn_and_what_resists() -> None:
    net = oracle_models.net()
    right = repair(net, FAILURES[:1], STAR, ONE)
    assert right.repaired == 1
    weak = Sgd(learning_rate=1e-3)
    (tried,) = repair_each(net, FAILURES[1:2], weak)
    assert tried.patch is not None  # it moves weights
    assert not tried.repaired  # and does not repair
    state = State.of(net)
    found = cumulative(net, FAILURES[:2], weak, references=[ONE], every=1)
    assert not state.changed(net)
    assert [outcome.failing for outcome in found.outcomes] == [False, True]
    assert [point.repaired for point in found.points] == [0, 0]
    assert [point.right for point in found.points] == [1.0, 0.5]
    assert found.points[-1].drift["one"].kl == pytest.approx(0, abs=1e-12)  # a repair that failed left nothing behind
    assert found.points[-1].held_out is None


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_net_as_it_was(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    net = oracle_models.net()
    untouched = State.of(net)
    moved = []

    def broken(*_: object, **__: object) -> None:
        moved.append(untouched.changed(net))
        raise error

    monkeypatch.setattr(module, "repair", broken)
    with pytest.raises(error):
        cumulative(net, FAILURES[:2], STAR)
    assert not untouched.changed(net)
    plain = module.answers

    def late(*given: object, **named: object) -> object:
        if untouched.changed(net):
            broken()
        return plain(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "answers", late)
    with pytest.raises(error):
        cumulative(net, FAILURES[:2], STAR)
    assert moved[0] == []
    assert moved[1]  # it struck while repairs were in the weights
    assert not untouched.changed(net)


def test_what_cannot_be_done_is_said_first() -> None:
    net = oracle_models.net()
    for failures, every in (([], 1), (FAILURES, 0), (FAILURES * 26, 1)):
        with pytest.raises(UsageError, match="expected 1 to 100"):
            cumulative(net, failures, STAR, every=every)
    with pytest.raises(FailuresError, match="different targets"):
        cumulative(net, [*FAILURES, Failure("say", " ho", "other")], STAR)
