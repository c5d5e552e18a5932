"""Completions: greedy as generate gives it, stop rules, samples by seed, likelihoods."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from oracle_models import net as tiny

import lmrepair.checks.sampling as sampling
from lmrepair import Net
from lmrepair.checks import Task, nats, write_greedy, write_samples
from lmrepair.errors import FailuresError
from lmrepair.failures import prompt_ids

TASKS = [Task(str(n), text, "", stop="") for n, text in enumerate(("open the file", "say", "sum of a list:", "hi"))]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def net(request: pytest.FixtureRequest) -> Net:
    return tiny(request.param)


def test_greedy_text_is_what_generate_gives(net: Net) -> None:
    found = write_greedy(net, TASKS, 12)
    for task, one in zip(TASKS, found, strict=True):
        ids = torch.tensor([prompt_ids(task.failure("?"), net.tokenizer)])
        made = net.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        text = net.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=False)
        assert text.removesuffix("</s>") == one.completion
        assert one.tokens == made.shape[1] - ids.shape[1]


def test_a_stop_rule_ends_a_completion_before_its_match(net: Net) -> None:
    whole = write_greedy(net, TASKS, 12)
    mark = whole[0].completion[3]
    stopped = write_greedy(net, [replace(TASKS[0], stop=f"[{mark}]"), *TASKS[1:]], 12)
    assert stopped[0].completion == whole[0].completion[: whole[0].completion.index(mark)]
    assert stopped[0].tokens < whole[0].tokens
    assert stopped[1:] == whole[1:]
    assert stopped[0].target == stopped[0].completion


def test_line_ends_that_close_a_completion_belong_to_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {1: "a", 2: "a\n", 3: "a\n\n", 4: "a\n\nb"}
    monkeypatch.setattr(sampling, "_text", lambda net, prompt, ids: texts[len(ids)])
    monkeypatch.setattr(sampling, "end_tokens", lambda net: frozenset())
    (found,) = write_greedy(tiny(), [Task("t", "x", "", stop=r"\n+(?=\S)")], 12)
    assert (found.completion, found.closing, found.target, found.tokens) == ("a", "\n\n", "a\n\n", 4)


def test_samples_follow_their_seed_and_temperature(net: Net) -> None:
    one, again = (write_samples(net, TASKS[:1], 4, 10, 1.0, [seed]) for seed in (3, 3))
    assert one == again
    assert one != write_samples(net, TASKS[:1], 4, 10, 1.0, [4])
    assert len({text.completion for text in write_samples(net, TASKS[:1], 6, 10, 5.0, [0])[0]}) > 1
    (greedy,) = write_greedy(net, TASKS[:1], 10)
    assert {text.completion for text in write_samples(net, TASKS[:1], 3, 10, 1e-4, [0])[0]} == {greedy.completion}
    assert write_samples(net, [], 3, 10, 1.0, []) == []


def test_samples_are_the_same_whatever_is_written_beside_them(net: Net) -> None:
    alone = [write_samples(net, [task], 3, 12, 1.0, [seed])[0] for seed, task in enumerate(TASKS)]
    assert write_samples(net, TASKS, 3, 12, 1.0, range(len(TASKS))) == alone


def test_tokens_come_as_often_as_the_model_says(net: Net) -> None:
    count, heat = 4000, 1.5
    (texts,) = write_samples(net, TASKS[:1], count, 1, heat, [5])
    ids = torch.tensor([prompt_ids(TASKS[0].failure("?"), net.tokenizer)])
    with torch.no_grad():
        chances = (net.model(ids).logits[0, -1].double() / heat).softmax(dim=0)
    likely = chances.topk(5)
    for chance, token in zip(likely.values.tolist(), likely.indices.tolist(), strict=True):
        text = net.tokenizer.decode([*ids[0, -1:].tolist(), token])[len(net.tokenizer.decode(ids[0, -1:])) :]
        same = [other for other in range(len(chances)) if other != token and net.tokenizer.decode([other]) == text]
        if same or token in sampling.end_tokens(net):
            continue
        found = sum(one.completion == text for one in texts) / count
        assert abs(found - chance) < 5 * math.sqrt(chance * (1 - chance) / count)


def test_nats_are_the_cross_entropy_of_the_completion(net: Net) -> None:
    (found,) = nats(net, TASKS[:1], [" with open"])
    (tokens,) = net.tokenize([TASKS[0].failure(" with open")])
    with torch.no_grad():
        logs = net.model(torch.tensor([tokens.ids])).logits[0].double().log_softmax(dim=1)
    wanted = -sum(float(logs[len(tokens.prompt) - 1 + at, token]) for at, token in enumerate(tokens.target))
    assert found == pytest.approx(wanted, rel=1e-5)
    assert nats(net, TASKS[:1], ["a" * 500]) == [math.inf]


def test_a_prompt_that_fills_the_context_is_refused(net: Net) -> None:
    with pytest.raises(FailuresError, match="no room for a completion"):
        write_greedy(net, [Task("long", "xyz " * 200, "", stop="")], 4)
