"""Other prompts for the same target: which they are, and that they are solved together with the failure."""

from __future__ import annotations

from dataclasses import replace

import oracle_models
import pytest
from oracle_models import TEXT, bold_star

from lmrepair.diagnosis.mistakes import diagnose
from lmrepair.errors import UsageError
from lmrepair.failures.forms import Template
from lmrepair.failures.rows import Failure
from lmrepair.failures.wordings import REQUESTS, Wordings, kindred
from lmrepair.loop.loop import repair, repair_each
from lmrepair.loop.solver import PREFIX as LENGTH, drawn_wordings
from lmrepair.methods.minkl import MinKl
from lmrepair.methods.star import Star

FAILURE = Failure("say it", " no", "one", ("say it", "speak up", "go on"))


def texts(net: object, found: list[object]) -> list[str]:
    return [net.tokenizer.decode(list(item.prompt)) for item in found]  # type: ignore[attr-defined]


def test_paraphrases_that_are_other_prompts_take_part() -> None:
    net = oracle_models.net()
    found = Wordings(paraphrases=True).of([FAILURE], net.tokenize)
    wanted = net.tokenize([FAILURE.asking("speak up"), FAILURE.asking("go on")])
    assert [item.ids for item in found] == [item.ids for item in wanted]
    assert [item.id for item in found] == ["one.0", "one.1"]
    assert Wordings().of([FAILURE], net.tokenize) == []


def test_texts_of_the_model_go_before_each_prompt() -> None:
    net = oracle_models.net()
    wordings = drawn_wordings(net, False, 2)
    assert wordings == drawn_wordings(net, False, 2) != drawn_wordings(net, False, 2, seed=1)
    assert len(set(wordings.before)) == 2
    found = wordings.of([FAILURE, replace(FAILURE, id="two", prompt="ask")], net.tokenize)
    assert len(found) == 4
    for item, lead in zip(found, wordings.before * 2, strict=True):
        prompt = FAILURE.prompt if item.id.startswith("one") else "ask"
        assert item == net.tokenize([Failure(lead + prompt, FAILURE.target, item.id)])[0]
        assert lead.endswith("\n")
        assert len(net.tokenizer(lead)["input_ids"]) <= 8 * LENGTH
    with pytest.raises(UsageError, match="prefixes is -1"):
        drawn_wordings(net, False, -1)


def test_a_chat_is_worded_in_its_last_message_and_gets_no_text_before_it() -> None:
    chat = Failure("", " no", "chat", ("other",), ({"role": "user", "content": "say it"},))
    assert chat.asked == "say it"
    assert chat.asking("other").messages == ({"role": "user", "content": "other"},)
    net = oracle_models.net()
    net.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    found = Wordings(True, ("lead\n",)).of([chat], net.tokenize)
    assert [item.prompt for item in found] == [net.tokenize([chat.asking("other")])[0].prompt]


def test_what_the_model_has_no_room_for_is_left_out() -> None:
    net = oracle_models.net()
    long = "say " * 400
    assert Wordings(True, (long + "\n",)).of([replace(FAILURE, paraphrases=(long, "go on"))], net.tokenize) == [
        replace(net.tokenize([FAILURE.asking("go on")])[0], id="one.1")
    ]


@pytest.mark.parametrize("method", [MinKl(margin=0.5), bold_star(learning_rate=0.03)], ids=["minkl", "star"])
def test_wordings_are_repaired_with_the_failure(method: MinKl | Star) -> None:
    net = oracle_models.net()
    others = [replace(FAILURE.asking(text), id=text) for text in FAILURE.paraphrases[1:]]
    assert all(item.mistakes for item in diagnose(net, [FAILURE, *others]))
    result = repair(net, [FAILURE], method, TEXT, wordings=Wordings(paraphrases=True))
    assert result.patch is not None
    assert result.repaired == 1
    assert len(result.outcomes) == 1
    assert result.patch.made.settings["paraphrases"] is True
    assert not any(item.mistakes for item in diagnose(net, others))
    result.patch.revert(net)
    (alone,) = repair_each(net, [FAILURE], method, wordings=Wordings(paraphrases=True))
    assert alone.patch is not None
    with alone.patch.on(net):
        assert not any(item.mistakes for item in diagnose(net, others))


COMMENT, SHELL = Template.parse("# {prompt}\\n{target}"), Template.parse("$ {prompt}\\n{target}\\n")
SYSTEM, USER = {"role": "system", "content": "be brief"}, {"role": "user", "content": "say it"}
ANSWER = {"role": "assistant", "content": "hm"}


def test_other_requests_stand_in_the_failures_own_form() -> None:
    found = kindred([FAILURE.wrapped(COMMENT), replace(FAILURE, prompt="speak").wrapped(COMMENT)])
    assert [one.prompt for one in found] == [f"# {text}\n" for text in REQUESTS]
    assert {(one.target, one.paraphrases) for one in found} == {("", ())}
    assert len({one.id for one in found}) == len(REQUESTS) == 32
    both = kindred([FAILURE.wrapped(COMMENT), FAILURE.wrapped(SHELL)])
    assert [one.prompt for one in both[:2]] == [f"# {REQUESTS[0]}\n", f"$ {REQUESTS[1]}\n"]
    assert len(both) == 32


def test_or_in_their_chats() -> None:
    asked = Failure("", "no", "a", messages=(SYSTEM, USER, ANSWER, USER), tools=({"name": "f"},), end_turn=False)
    found = kindred([asked, replace(asked, messages=(SYSTEM, {**USER, "content": "other"}))])
    assert [one.messages for one in found] == [(SYSTEM, {"role": "user", "content": text}) for text in REQUESTS]
    assert all(one.tools == asked.tools and not one.end_turn and not one.target for one in found)
    plain = kindred([FAILURE.in_chat(), asked, replace(asked, messages=({**SYSTEM, "role": "developer"}, USER))])
    assert [len(one.messages) for one in plain[:3]] == [1, 2, 2]
    assert plain[2].messages[0]["role"] == "developer"


def test_prompts_without_a_form_have_none() -> None:
    assert kindred([FAILURE, FAILURE.wrapped(Template.parse("{prompt}{target}"))]) == []
    assert kindred([]) == []
