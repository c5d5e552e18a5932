"""Failures in: JSON lines, templates, and the prompt/target boundary in token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import oracle_models
import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lmrepair import Failure, FailuresError, Template, UsageError, read_failures
from lmrepair.failures.rows import contradictions
from lmrepair.failures.tokens import tokenize

EMBEDDED = Path(__file__).resolve().parents[2] / "lmrepair" / "model" / "embedded" / "model"
TEXTS = ["import os\nx = 1\n", "def add(a, b):\n    return a + b\n", "print(x)\nfor i in range(10):\n    pass\n"] * 20


def write(path: Path, *lines: str) -> Path:
    path.write_bytes("\n".join(lines).encode())
    return path


def sentencepiece(eos: bool = False) -> PreTrainedTokenizerFast:
    """A Metaspace Unigram tokenizer as SentencePiece models convert to: a space before the first word, BOS."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    made.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>")
    )
    single = "<s> $A </s>" if eos else "<s> $A"
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


def llama_style() -> PreTrainedTokenizerFast:
    """BPE with byte fallback that writes spaces as ▁ and prepends one, as Llama's first tokenizers do."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    letters = sorted({c for text in TEXTS for c in text if c not in " \n"})
    made = Tokenizer(
        models.BPE(
            vocab={piece: at for at, piece in enumerate([*pieces, *letters, "▁r", "▁x", "in"])},
            merges=[("▁", "r"), ("▁", "x"), ("i", "n")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


TOKENIZERS = {
    "byte-level": lambda: AutoTokenizer.from_pretrained(EMBEDDED),
    "byte-level, few merges": oracle_models.tokenizer,
    "sentencepiece": sentencepiece,
    "sentencepiece with eos": lambda: sentencepiece(eos=True),
    "byte fallback": llama_style,
}


def test_rows_become_failures(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "target": "b", "paraphrases": ["c"], "note": "ignored"},
        {"messages": [{"role": "user", "content": "hi"}], "target": "yes", "id": 7},
    ]
    path = write(tmp_path / "f.jsonl", "", *map(json.dumps, rows), "  ")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    first, second = read_failures(path)
    assert first == Failure("a", "b", "1", ("c",))
    assert (second.id, second.messages, second.prompt) == ("7", ({"role": "user", "content": "hi"},), "")
    assert len(read_failures(path, limit=1)) == 1
    for limit in (0, -1):
        with pytest.raises(UsageError, match=f"^limit is {limit}; expected at least 1, or None for all rows$"):
            read_failures(path, limit=limit)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["[1]"], "item 1: found a number"),
        (["1"], "line 1: found a number"),
        (['{"prompt": "a", "target": "b"}', "{"], "line 2: broken JSON"),
        (["[" * 100_000], "broken JSON (nested too deeply)"),
        (['{"a": ' * 100_000], "line 1: broken JSON (nested too deeply)"),
        (['{"target": "b"}'], "line 1: no prompt; expected one of prompt and messages"),
        (['{"promt": "a", "target": "b"}'], "line 1: unknown key 'promt' (did you mean 'prompt'?)"),
        (['{"prompt": "a", "messages": [], "target": "b"}'], "both prompt and messages"),
        (['{"prompt": "a", "target": null}'], "line 1: target is null"),
        (['{"prompt": 3, "target": "b"}'], "line 1: prompt is a number"),
        (['{"prompt": "a", "target": "\\ud800"}'], "half of a surrogate pair"),
        (['{"prompt": "a", "target": "b", "id": true}'], "id is true or false"),
        (['{"prompt": "a", "target": "b", "paraphrases": "c"}'], "paraphrases is text"),
        (['{"messages": [{"role": "user"}], "target": "b"}'], "message 1 has no content"),
        (['{"messages": "hi", "target": "b"}'], "messages is not a list"),
        (['{"prompt": "a", "target": {}}'], "line 1: target is an object"),
        (["", "  "], "no failures in it"),
    ],
)
def test_bad_rows_are_refused_with_their_line(lines: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(FailuresError) as caught:
        read_failures(write(tmp_path / "f.jsonl", *lines))
    assert said in str(caught.value)


def test_templates_wrap_and_unescape() -> None:
    made = Template.parse(r"# {prompt}\n\t{target}\n\\n")
    wrapped = Failure("{target} {x}", "{prompt}", "1", ("other",)).wrapped(made)
    assert wrapped.prompt == "# {target} {x}\n\t"
    assert wrapped.target == "{prompt}\n\\n"
    assert wrapped.paraphrases == ("# other\n\t",)
    assert Template.parse("{prompt}{target}\\").after == "\\"
    for bad in ("{prompt}", "{target}", "{target}{prompt}", "{prompt}{prompt}{target}"):
        with pytest.raises(UsageError, match="template"):
            Template.parse(bad)
    with pytest.raises(FailuresError, match="chat template"):
        Failure("", "t", "1", (), ({"role": "user", "content": "hi"},)).wrapped(made)


def test_contradictions_are_found() -> None:
    same = [Failure("a", "b", "1"), Failure("a", "b", "2"), Failure("a", "c", "3"), Failure("d", "c", "4")]
    assert [(x.id, y.id) for x, y in contradictions(same)] == [("1", "3")]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ("def add(a, b):\n", "    return a + b\n"),
        ("x = ", "1\n"),
        ("for i in ran", "ge(10):\n"),
        ("import os", "\nx = 1\n"),
        ("print(", "x)\n"),
        ("return ", " a"),
        ("pass\n\n", "\n\nimport"),
        ("i", "n"),
    ],
)
def test_target_ids_continue_the_prompt_exactly(kind: str, prompt: str, target: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    made = tokenize(Failure(prompt, target, "1"), tokenizer)
    alone = tokenizer(prompt)["input_ids"]
    if alone[-1] == tokenizer.eos_token_id and kind.endswith("eos"):
        alone = alone[:-1]
    assert list(made.prompt) == alone
    assert list(made.ids).count(tokenizer.bos_token_id) == 1
    assert made.ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id in (tokenizer.bos_token_id, None) or tokenizer.eos_token_id not in made.ids
    decoded = tokenizer.decode(list(made.ids), clean_up_tokenization_spaces=False)
    start = tokenizer.decode(list(made.prompt), clean_up_tokenization_spaces=False)
    assert decoded == start + target


@settings(deadline=None, max_examples=150)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=30), st.text(min_size=1, max_size=30))
def test_any_text_survives_a_byte_level_tokenizer(prompt: str, target: str) -> None:
    if any("\ud800" <= c <= "\udfff" for c in target) or "<|endoftext|>" in prompt + target:
        return
    tokenizer = _EMBEDDED_TOKENIZER
    made = tokenize(Failure(prompt, target, "1"), tokenizer)
    assert list(made.prompt) == tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(list(made.ids)[1:], clean_up_tokenization_spaces=False) == prompt + target


_EMBEDDED_TOKENIZER = AutoTokenizer.from_pretrained(EMBEDDED)


def test_messages_are_rendered_with_the_chat_template_and_one_bos() -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    failure = Failure("", "yes", "1", (), ({"role": "user", "content": "hi"},))
    with pytest.raises(FailuresError, match="no chat template"):
        tokenize(failure, tokenizer)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    made = tokenize(failure, tokenizer)
    assert tokenizer.decode(list(made.ids)) == "<|endoftext|>[user] hi\n[assistant] yes"
    assert made.ids.count(tokenizer.bos_token_id) == 1


def test_what_cannot_be_written_or_does_not_fit_is_refused() -> None:
    cases: list[tuple[Any, Failure, int | None, str]] = [
        (sentencepiece(), Failure("x", "日本", "1"), None, "cannot write the target"),
        (oracle_models.tokenizer(), Failure("a b c", " d" * 20, "1"), 12, "the model's context is 12"),
    ]
    for tokenizer, failure, context, said in cases:
        with pytest.raises(FailuresError, match=said):
            tokenize(failure, tokenizer, context)
