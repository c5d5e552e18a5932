"""Chats: what the model reads up to the answer, what ends the turn, and how templates say no."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle_models
import pytest
from transformers import PreTrainedTokenizerFast

from lmrepair import Failure, FailuresError, read_failures
from lmrepair.failures import Wordings, contradictions, prompt_ids, tokenize
from lmrepair.failures.chats import rendered

ASK = {"role": "user", "content": "hi"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
}
RESULT = {"role": "tool", "tool_call_id": "1", "name": "add", "content": "3"}
TOOLS = [{"type": "function", "function": {"name": "add"}}]
OWN = ["<|im_start|>", "<|im_end|>", "<|end|>", "<|user|>", "<|assistant|>"]
TURNS = "{% for m in messages %}{{'<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n'}}{% endfor %}"
PREFIX = "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
# template → what is read up to the answer, what stands before the answer, and what ends its turn
TEMPLATES = {
    "ends with a token": (TURNS + PREFIX, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "", "<|im_end|>"),
    "no generation prompt": (TURNS, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "", "<|im_end|>"),
    "the answer follows at once": (
        "{{bos_token}}{% for m in messages %}{% if m.role == 'user' %}{{'[INST] ' + m.content + ' [/INST]'}}"
        "{% elif m.role == 'assistant' %}{{' ' + m.content + ' ' + eos_token}}"
        "{% else %}{{raise_exception('System role not supported')}}{% endif %}{% endfor %}",
        "<s>[INST] hi [/INST]",
        " ",
        " </s>",
    ),
    "a space before the answer": (
        "{% for m in messages %}{{('USER: ' if m.role == 'user' else 'BOT: ') + m.content + eos_token + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}BOT:{% endif %}",
        "USER: hi</s>\nBOT:",
        " ",
        "</s>",
    ),
    "the end of the text behind the end of the turn": (
        "{% for m in messages %}{{'<|' + m.role + '|>\n' + m.content + '<|end|>\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{'<|assistant|>\n'}}{% else %}{{eos_token}}{% endif %}",
        "<|user|>\nhi<|end|>\n<|assistant|>\n",
        "",
        "<|end|>",
    ),
    "no end of the turn": (
        "{% for m in messages %}[{{m.role}}] {{m.content}}\n{% endfor %}{% if add_generation_prompt %}[assistant] "
        "{% endif %}",
        "[user] hi\n[assistant] ",
        "",
        "",
    ),
    "thoughts in the last turn alone": (
        "{% for m in messages %}{{'<|im_start|>' + m.role + '\n'}}{% if m.role == 'assistant' and loop.last %}"
        "{{'<think>\n\n</think>\n\n'}}{% endif %}{{m.content + '<|im_end|>\n'}}{% endfor %}" + PREFIX,
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "",
        "<|im_end|>",
    ),
}
TOOL_TEMPLATE = (
    "{% if tools %}{{tools | tojson}}\n{% endif %}{% for m in messages %}{{'<|im_start|>' + m.role + '\n'}}"
    "{{m.content or ''}}{% for c in m.tool_calls or [] %}<call>{{c.function | tojson}}</call>{% endfor %}"
    "{{'<|im_end|>\n'}}{% endfor %}" + PREFIX
)


def with_template(template: Any) -> PreTrainedTokenizerFast:
    made = oracle_models.tokenizer()
    made.add_special_tokens({"additional_special_tokens": OWN})
    made.chat_template = template
    return made


def chat(*turns: dict[str, Any], target: str = "yes", **more: Any) -> Failure:
    return Failure("", target, "row", messages=turns or (ASK,), **more)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_answer_starts_behind_the_prefix_and_goes_on_to_the_end_of_the_turn(kind: str) -> None:
    template, prompt, lead, end = TEMPLATES[kind]
    target = lead + "yes" + end
    tokenizer = with_template(template)
    found = rendered(chat(), tokenizer)
    assert (found.prompt, found.target) == (prompt, target)
    made = tokenize(chat(), tokenizer)
    assert tokenizer.decode(list(made.prompt)) == prompt
    assert tokenizer.decode(list(made.ids)) == prompt + target
    assert prompt_ids(chat(), tokenizer) == made.prompt
    bare = tokenize(chat(end_turn=False), tokenizer)
    assert tokenizer.decode(list(bare.ids)) == prompt + lead + "yes"


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_chat_that_ends_with_an_assistants_turn_is_gone_on_with(kind: str) -> None:
    tokenizer = with_template(TEMPLATES[kind][0])
    found = rendered(chat(ASK, {"role": "assistant", "content": "I say"}, target=" so"), tokenizer)
    assert found.prompt.endswith("I say")
    assert found.target == " so" + TEMPLATES[kind][3]


def test_an_end_that_the_target_has_already_is_not_doubled() -> None:
    tokenizer = with_template(TEMPLATES["ends with a token"][0])
    for target in ("yes<|im_end|>", "<|im_end|>"):
        assert rendered(chat(target=target), tokenizer).target == target
    (end,) = tokenize(chat(target="<|im_end|>"), tokenizer).target
    assert tokenizer.convert_ids_to_tokens(end) == "<|im_end|>"


def test_a_turn_ends_with_a_token_that_was_added_though_it_is_none_of_the_special_ones() -> None:
    tokenizer = with_template("{% for m in messages %}{{'[' + m.role + '] ' + m.content + '<stop>\n'}}{% endfor %}")
    tokenizer.add_tokens(["<stop>"])
    assert "<stop>" not in tokenizer.all_special_tokens
    assert rendered(chat(), tokenizer).target == " yes<stop>"


def test_a_tokenizer_that_tidies_spaces_up_hides_no_target() -> None:
    tokenizer = oracle_models.tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    assert tokenizer.decode(tokenizer("an .")["input_ids"]) == "<s>an."
    made = tokenize(Failure("a", "n .", "row"), tokenizer)
    assert tokenizer.decode(list(made.ids), clean_up_tokenization_spaces=False) == "<s>an ."


def test_the_space_before_an_answer_is_the_answers_whatever_stands_before_it() -> None:
    tokenizer = with_template("{% for m in messages %}{{m.role + ' X ' + m.content + '\n'}}{% endfor %}")
    found = rendered(chat(), tokenizer)
    assert (found.prompt, found.target) == ("user X hi\nassistant X", " yes")


def test_documents_reach_the_template() -> None:
    tokenizer = with_template("{% for d in documents %}{{d.text}}{% endfor %}" + TURNS + PREFIX)
    found = rendered(chat(chat_template_kwargs={"documents": [{"text": "a text"}]}), tokenizer)
    assert found.prompt.startswith("a text<|im_start|>user")


def test_calls_that_a_template_writes_elsewhere_are_no_answer() -> None:
    template = "{% for m in messages %}{{m.content if m.role == 'user' else m.tool_calls}}{% endfor %}" + PREFIX
    with pytest.raises(FailuresError, match="does not write the assistant's last turn behind its prompt"):
        rendered(Failure("", "x", "row", messages=(ASK,), turn=CALL), with_template(template))


def test_tools_and_their_calls_are_given_to_the_template_as_they_are() -> None:
    tokenizer = with_template(TOOL_TEMPLATE)
    found = rendered(chat(ASK, CALL, RESULT, tools=tuple(TOOLS)), tokenizer)
    assert found.prompt.startswith(json.dumps(TOOLS))
    assert '<call>{"name": "add", "arguments": {"a": 1}}</call>' in found.prompt
    assert "<|im_start|>tool\n3<|im_end|>" in found.prompt


def test_a_call_of_tools_can_be_the_answer(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text(json.dumps({"messages": [ASK, CALL], "tools": TOOLS}))
    (failure,) = read_failures(path)
    assert failure.turn == CALL
    assert json.loads(failure.target) == CALL["tool_calls"]
    call = '<call>{"name": "add", "arguments": {"a": 1}}</call>'
    tokenizer = with_template(TOOL_TEMPLATE)
    assert rendered(failure, tokenizer).target == call + "<|im_end|>"
    assert rendered(replace(failure, end_turn=False), tokenizer).target == call
    with pytest.raises(FailuresError, match="does not write the assistant's last turn"):
        rendered(failure, with_template("{% for m in messages %}{{m.content or ''}}{% endfor %}"))


def test_settings_reach_the_template_and_those_of_the_call_are_refused() -> None:
    tokenizer = with_template(TURNS + PREFIX + "{% if think %}<think>{% endif %}")
    assert rendered(chat(chat_template_kwargs={"think": True}), tokenizer).prompt.endswith("assistant\n<think>")
    for name in ("tokenize", "add_generation_prompt", "messages", "tools"):
        advice = "put tools beside messages" if name == "tools" else "leave it out"
        with pytest.raises(FailuresError) as refused:
            rendered(chat(chat_template_kwargs={name: True}), tokenizer)
        assert str(refused.value) == (f"failure 'row': chat_template_kwargs has '{name}', which is set here; {advice}")


def test_what_a_template_does_not_read_is_said(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = with_template(TEMPLATES["no end of the turn"][0])
    rendered(chat(ASK, {**CALL, "content": "x"}, RESULT, tools=({},), chat_template_kwargs={"think": True}), tokenizer)
    said = [record.getMessage() for record in caplog.records]
    assert [line.split("does not read ")[1].split(";")[0] for line in said] == ["tools", "think", "tool_calls"]
    caplog.clear()
    rendered(chat(ASK, CALL, RESULT, tools=tuple(TOOLS)), with_template(TOOL_TEMPLATE))
    assert not caplog.records


REFUSED = {
    "syntax": ("{% for m in %}", "Expected an expression"),
    "undefined": ("{{ nothing.at_all }}", "'nothing' is undefined"),
    "division": ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
    "types": ("{{ 'a' + 1 }}", "TypeError: can only concatenate"),
    "memory": ("{{ 'a' * 10 ** 15 }}", "MemoryError"),
    "endless": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "sandbox": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "own words": ("{{ raise_exception('Conversation roles must alternate\n user/assistant') }}", "must alternate user"),
    "filter": ("{{ 1 | nothing }}", "No filter named 'nothing'"),
    "several": ({"rag": "a", "tools": "b"}, 'several chat templates and no default (rag, tools); name one: "chat_'),
    "the default of several": ({"rag": "a", "default": "{{ nothing.at_all }}"}, "'nothing' is undefined"),
    "none": (None, "no chat template"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_template_raises_is_one_line_with_the_id_and_its_words(kind: str) -> None:
    template, words = REFUSED[kind]
    with pytest.raises(FailuresError) as caught:
        tokenize(chat(), with_template(template))
    assert "'row'" in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("failure", [chat(), Failure("hi", "yes", "row").in_chat()], ids=["messages", "--chat"])
def test_a_chat_without_a_template_is_refused_in_words_that_hold_for_a_prompt_too(failure: Failure) -> None:
    with pytest.raises(FailuresError) as caught:
        rendered(failure, with_template(None))
    assert str(caught.value) == (
        "failure 'row' is asked as a chat, but the tokenizer has no chat template; give a prompt, without --chat"
    )


def test_one_of_several_templates_can_be_named() -> None:
    tokenizer = with_template({"rag": "{{messages[0].content}}: ", "tools": "b"})
    assert rendered(chat(chat_template_kwargs={"chat_template": "rag"}), tokenizer).prompt == "hi: "
    tokenizer = with_template({"rag": "{{ nothing.at_all }}", "tools": "b"})
    with pytest.raises(FailuresError, match="the chat template refuses it: 'nothing' is undefined"):
        rendered(chat(chat_template_kwargs={"chat_template": "rag"}), tokenizer)


def test_parts_reach_templates_that_know_them() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": " you"}]}
    knows = "{% for m in messages %}{% for p in m.content %}{{p.text}}{% endfor %}{% endfor %}"
    assert rendered(chat(parts), with_template(knows)).prompt == "hi you"
    assert chat(parts).asked == "hi you"
    with pytest.raises(FailuresError, match="content parts as Python objects"):
        rendered(chat(parts), with_template(TEMPLATES["no end of the turn"][0]))


def test_a_second_bos_is_said_with_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = oracle_models.tokenizer()
    made = tokenize(Failure("<s>hi", "yes", "row"), tokenizer)
    assert made.prompt[:2] == (tokenizer.bos_token_id,) * 2
    assert "begins with <s>" in caplog.text
    assert "leave it out" in caplog.text
    caplog.clear()
    tokenize(Failure("hi", "yes"), tokenizer)
    assert not caplog.records


def test_odd_prompts_and_targets_have_tokens_or_are_refused() -> None:
    tokenizer = oracle_models.tokenizer()
    assert tokenize(Failure("", "yes"), tokenizer).prompt == (tokenizer.bos_token_id,)
    assert tokenize(Failure("hi", "</s>"), tokenizer).target == (tokenizer.eos_token_id,)
    assert tokenize(Failure("hi</s>", "x"), tokenizer).prompt[-1] == tokenizer.eos_token_id
    for failure in (Failure("\ud800", "a", "row"), Failure("a", "\udc00", "row"), chat({**ASK, "content": "\ud800"})):
        with pytest.raises(FailuresError, match="'row'"):
            tokenize(failure, with_template(TURNS) if failure.messages else tokenizer)
    bare = oracle_models.tokenizer()
    bare.backend_tokenizer.post_processor = None
    with pytest.raises(FailuresError, match="no tokens and the tokenizer adds none"):
        tokenize(Failure("", "a"), bare)


def test_other_wordings_of_a_chat_are_chats() -> None:
    other = ({"role": "system", "content": "Be brief"}, {"role": "user", "content": "hello"})
    failure = chat(ASK, CALL, RESULT, paraphrases=("hey", other, "hi"))
    worded = failure.otherwise()
    assert [one.asked for one in worded] == ["hey", "hello"]
    assert [len(one.messages) for one in worded] == [3, 2]
    tokenizer = with_template(TOOL_TEMPLATE)
    made = Wordings(paraphrases=True).of([failure], lambda rows: [tokenize(row, tokenizer) for row in rows])
    assert [tokenizer.decode(list(one.target)) for one in made] == ["yes<|im_end|>"] * 2
    assert "hello<|im_end|>" in tokenizer.decode(list(made[1].prompt))


def test_failures_are_values() -> None:
    one, same = (chat(ASK, CALL, RESULT, tools=tuple(TOOLS), chat_template_kwargs={"a": [1]}) for _ in range(2))
    assert one == same
    assert len({one, same, replace(one, tools=())}) == 2
    assert contradictions([one, replace(one, target="no")])
    assert not contradictions([one, replace(one, target="no", tools=())])
    assert replace(one, messages=(ASK,)).answered()[-1] == {"role": "assistant", "content": "yes"}


@pytest.fixture(autouse=True)
def _notes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lmrepair")
