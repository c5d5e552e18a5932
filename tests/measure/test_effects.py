"""Probes, neighbours and effects, against plain statements of what they are."""

from __future__ import annotations

from dataclasses import replace

import oracle
import oracle_models
import pytest
from oracle_models import FAILURES, State, bold_star

from lmrepair import Failure, UsageError, answers, evaluate, repair_each
from lmrepair.loop.outcome import Repair
from lmrepair.measure.effects import Standing, effect, held_out_scores, neighbours, probes, side_effects
from lmrepair.patch.patch import Patch


def patch_for(net: oracle_models.Net, failure: Failure) -> Patch:
    result: Repair
    (result,) = repair_each(net, [failure], bold_star(learning_rate=0.1))
    assert result.patch is not None
    assert result.repaired == 1
    return result.patch


def test_probes() -> None:
    failure = Failure("# Sort the list\n", "a.sort()\n", "x", ("# Order it\n", "# Sort the list\n"))
    example = Failure("# Sum it\n", "sum(a)", "y", ("no",))
    found = probes(failure, example)
    assert [row.prompt for row in found["paraphrases"]] == ["# Order it\n"]
    assert [row.prompt for row in found["context"]] == ["# Sum it\nsum(a)\n# Sort the list\n"]
    assert [row.prompt for row in found["case"]] == ["# sort the list\n"]
    rows = [row for rows in found.values() for row in rows]
    assert {row.target for row in rows} == {"a.sort()\n"}
    assert len({row.id for row in rows}) == len(rows)
    assert not any(row.paraphrases for row in rows)
    (context,) = probes(failure, replace(example, target="sum(a)\n"))["context"]
    assert context.prompt == "# Sum it\nsum(a)\n# Sort the list\n"


@pytest.mark.parametrize(
    ("prompt", "other"),
    [("Ab", "ab"), ("# über uns", "# Über uns"), ("1 + 1", None), ("", None), ("_x y", "_X y"), ("名前", None)],
)
def test_case(prompt: str, other: str | None) -> None:
    found = probes(Failure(prompt, "t"))
    assert [row.prompt for row in found["case"]] == ([] if other is None else [other])
    assert found["context"] == found["paraphrases"] == []


def test_probes_of_a_chat() -> None:
    chat = ({"role": "system", "content": "Be brief"}, {"role": "user", "content": "Sort"})
    failure = Failure("", "a.sort()", "x", ("Order",), chat)
    other = Failure("", "sum(a)", "y", (), ({"role": "user", "content": "Sum"},))
    found = probes(failure, other)
    assert found["paraphrases"][0].messages == (chat[0], {"role": "user", "content": "Order"})
    assert found["case"][0].messages == (chat[0], {"role": "user", "content": "sort"})
    said = [(message["role"], message["content"]) for message in found["context"][0].messages]
    assert said == [("user", "Sum"), ("assistant", "sum(a)"), ("system", "Be brief"), ("user", "Sort")]


def test_neighbours_are_the_nearest_that_want_something_else() -> None:
    failure = Failure("open the file f", "open(f)", "x", ("read the file f",))
    pool = [
        Failure("close the door", "door.close()"),
        Failure("Open the file g", "open(g)"),
        Failure("open the file f", "other"),  # the failure's own prompt
        Failure("read the file f", "f.read()"),  # its own paraphrase
        Failure("please open the file f", "open(f)\n"),  # the same target
        Failure("sum a list", "sum(a)"),  # nothing in common
        Failure("open the file g now or a little later if you can", "open(g)"),
        Failure("open the file g now", "open(g)"),
    ]
    assert neighbours(failure, pool) == [pool[1], pool[7], pool[6], pool[0]]  # of 3, 3, 3 and 1 shared tokens
    assert neighbours(failure, pool, 1) == [pool[1]]
    assert neighbours(failure, []) == []


@pytest.mark.parametrize("kind", oracle_models.KINDS)
def test_effects_are_those_of_a_plain_loop(kind: str) -> None:
    net = oracle_models.net(kind)
    untouched = State.of(net)
    patch = patch_for(net, FAILURES[0])
    rows = FAILURES[1:]

    def read() -> tuple[list[float], list[float], list[float], list[list[int]], list[list[int]]]:
        match, ranks, gaps, said, texts = [], [], [], [], []
        for item in net.tokenize(rows):
            logits = oracle.logits(net.model, item.ids)[len(item.prompt) - 1 : -1]
            said.append([int(row.argmax()) for row in logits])
            match.append(sum(a == b for a, b in zip(said[-1], item.target, strict=True)) / len(item.target))
            places = [int((row > row[token]).sum()) + 1 for row, token in zip(logits, item.target, strict=True)]
            ranks.append(sum(places) / len(places))
            chances = [row.softmax(0) for row in logits]
            best = [
                max(float(p) for t, p in enumerate(row) if t != token)
                for row, token in zip(chances, item.target, strict=True)
            ]
            wanted = [float(row[token]) for row, token in zip(chances, item.target, strict=True)]
            gaps.append(sum(w - b for w, b in zip(wanted, best, strict=True)) / len(best))
            texts.append(oracle.greedy(net.model, item.prompt, len(item.target)))
        return match, ranks, gaps, said, texts

    before = read()
    with patch.on(net):
        after = read()
        later = answers(net, rows)
    found = effect(answers(net, rows), later)
    assert not untouched.changed(net)
    for standing, (match, ranks, gaps, _, _) in ((found.before, before), (found.after, after)):
        assert standing.match == pytest.approx(sum(match) / 3)
        assert standing.rank == pytest.approx(sum(ranks) / 3)
        assert standing.gap == pytest.approx(sum(gaps) / 3, abs=1e-5)
        assert standing.exact == pytest.approx(match.count(1.0) / 3)
    same = [sum(a == b for a, b in zip(x, y, strict=True)) / len(x) for x, y in zip(before[3], after[3], strict=True)]
    assert found.unchanged == pytest.approx(sum(same) / 3)
    assert found.unchanged < 1
    assert found.unchanged_texts == pytest.approx(sum(a == b for a, b in zip(before[4], after[4], strict=True)) / 3)
    assert found.probes == 3


def test_reciprocal_rank_is_the_mean_over_positions_then_probes() -> None:
    (one, *_) = answers(oracle_models.net(), FAILURES[2:3], generate=False)
    a = replace(one, rank=(1, 4), gap=(0.5, -0.5), preferred=one.tokens.target)
    b = replace(one, rank=(2,), gap=(-0.2,), preferred=one.tokens.target)
    found = Standing.of([a, b])
    assert found.reciprocal_rank == pytest.approx(((1 + 1 / 4) / 2 + 1 / 2) / 2)
    assert found.rank == pytest.approx((2.5 + 2) / 2)
    assert found.gap == pytest.approx(-0.1)


def test_effects_compare_the_same_probes() -> None:
    net = oracle_models.net()
    found = answers(net, FAILURES, generate=False)
    with pytest.raises(UsageError, match="same probes"):
        effect(found, found[::-1])
    with pytest.raises(UsageError, match="same probes"):
        effect([], [])
    assert effect(found, found).unchanged == 1.0
    assert effect(found, found).unchanged_texts is None


def test_side_effects_of_a_patch() -> None:
    net = oracle_models.net()
    untouched = State.of(net)
    failure = replace(FAILURES[0], paraphrases=("Open that file", "file, open"))
    patch = patch_for(net, failure)
    pool = [failure, Failure("close the file", " f.close()"), *FAILURES[1:]]
    found = side_effects(net, patch, [failure], pool)
    assert not untouched.changed(net)
    assert {kind: item.probes for kind, item in found.generalisation.items()} == {
        "paraphrases": 2,
        "context": 1,
        "case": 1,
    }
    assert found.specificity is not None
    assert found.specificity.probes == 2  # "close the file" and the one about the list: they share "the"
    assert found.specificity.unchanged_texts is not None
    assert found.skipped == 0
    for kind, rows in probes(failure, pool[1]).items():
        assert found.generalisation[kind].before.match == pytest.approx(
            sum(item.match for item in answers(net, rows, generate=False)) / len(rows)
        )
        with patch.on(net):
            after = answers(net, rows, generate=False)
        assert found.generalisation[kind].after.match == pytest.approx(sum(i.match for i in after) / len(rows))


def test_kinds_do_not_mix_where_there_are_several_failures() -> None:
    net = oracle_models.net()
    patch = patch_for(net, FAILURES[0])
    rows = [
        replace(FAILURES[0], paraphrases=("Open that file", "file, open")),
        replace(FAILURES[1], paraphrases=("Sum!",)),
    ]
    found = side_effects(net, patch, rows)
    for kind in ("paraphrases", "case", "context"):
        asked = [probe for row, other in zip(rows, rows[::-1], strict=True) for probe in probes(row, other)[kind]]
        before = answers(net, asked, generate=False)
        with patch.on(net):
            after = answers(net, asked, generate=False)
        ours, wanted = found.generalisation[kind], effect(before, after)
        assert (ours.probes, ours.unchanged) == (wanted.probes, wanted.unchanged)
        for one, other in ((ours.before, wanted.before), (ours.after, wanted.after)):
            assert (one.match, one.rank) == (other.match, other.rank)
            assert one.gap == pytest.approx(other.gap, abs=1e-5)  # batched otherwise
    assert found.specificity is None


def test_a_repaired_failure_is_nobodys_neighbour() -> None:
    net = oracle_models.net()
    patch = patch_for(net, FAILURES[0])
    other = Failure("close the file", " f.close()", "close")
    alone = side_effects(net, patch, [FAILURES[0]], [FAILURES[0], other, FAILURES[2]])
    both = side_effects(net, patch, [FAILURES[0], other], [FAILURES[0], other, FAILURES[2]])
    assert alone.specificity is not None
    assert alone.specificity.probes == 1
    assert both.specificity is None


def test_probes_the_model_has_no_room_for_are_counted() -> None:
    net = oracle_models.net()
    patch = patch_for(net, FAILURES[0])
    pool = [Failure("the file " + "x" * 60, " y" * 10), Failure("z" * 80 + " file", " q")]
    found = side_effects(net, patch, FAILURES[:1], pool)
    assert "context" not in found.generalisation
    assert found.skipped == 1
    assert side_effects(net, patch, FAILURES[:1]).specificity is None


def test_held_out_rows_after_each_patch() -> None:
    net = oracle_models.net()
    untouched = State.of(net)
    patches = [patch_for(net, FAILURES[0]), patch_for(net, FAILURES[1])]
    found = held_out_scores(net, patches, FAILURES[2:], generate=True)
    assert found.before == evaluate(net, FAILURES[2:], texts=True)
    for patch, after in zip(patches, found.after, strict=True):
        with patch.on(net):
            assert evaluate(net, FAILURES[2:], texts=True) == after
    assert not untouched.changed(net)
    assert held_out_scores(net, [], FAILURES, texts=False).before.teacher_bleu is None
