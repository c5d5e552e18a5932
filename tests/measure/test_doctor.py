"""What is found of a model before its first repair: places, the head, traps of a tokenizer, needs, engines."""

from __future__ import annotations

import copy
import json
from dataclasses import astuple, replace
from typing import Any

import mixtures
import pytest
import torch
from command import Run
from oracle_models import FAILURES, State, net as tiny
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lmrepair import MinKl, Net
from lmrepair.loop.untouched import STAGES
from lmrepair.measure import examine
from lmrepair.measure.doctor import Speed, needs, served, slowness, traps
from lmrepair.measure.doctor.estimate import GATE, _factoring, _gathering, _moments, _numbers, _rate, _sums
from lmrepair.model import Asked, Source, planned
from lmrepair.model.statistics.sums import Sums

CHAT = "{% for m in messages %}<s>{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
SPEED = Speed(token=1e-3, text=5e-4, step=1e-2, answer=2e-3, byte=1e-9)


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 1.0), (torch.bfloat16, 1e-3), (torch.float64, 1e-3)])
def test_how_quick_a_dtype_is_beside_float32(dtype: torch.dtype, least: float) -> None:
    net = tiny("llama")
    assert least <= slowness(Net(net.model.to(dtype), net.tokenizer)) <= (1.0 if dtype == torch.float32 else 1e3)


def kinds(net: Net) -> list[str]:
    return [trap.kind for trap in traps(net)]


def with_tokenizer(net: Net, **settings: Any) -> Net:
    tokenizer = copy.deepcopy(net.tokenizer)
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    net.tokenizer = tokenizer
    return net


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_is_said_as_it_is_and_not_changed(kind: str) -> None:
    net = tiny(kind)
    before = State.of(net)
    found = examine(net)
    assert before.changed(net) == []
    assert found.places.layers == 3
    assert found.places.neurons == (48, 48, 48)
    assert found.places.ffn == (
        ("model.layers.N.mlp.down_proj",) if kind == "llama" else ("transformer.h.N.mlp.c_proj",)
    )
    assert found.places.head == "lm_head"
    assert found.places.norm == ("model.norm" if kind == "llama" else "transformer.ln_f")
    assert found.logits.tied == (kind == "gpt2")
    assert (found.logits.plain, found.logits.cap, found.logits.scale) == (True, 0.0, 1.0)
    assert found.context == 96
    assert found.parameters == sum(parameter.numel() for parameter in net.model.parameters())
    assert found.dtypes == {"float32": 4 * found.parameters}
    assert found.turn_end is None


def test_traps_of_chats() -> None:
    net = with_tokenizer(tiny(), chat_template=CHAT)
    net.model.generation_config.eos_token_id = 1
    assert "bos" in kinds(net)  # the template writes <s>, and so does the tokenizer
    assert "turn" not in kinds(net)
    net.model.generation_config.eos_token_id = 5
    assert {"turn", "stop"} <= set(kinds(net))
    net = with_tokenizer(net, chat_template=CHAT.replace("</s>", "."))
    assert "ends an answer with no token" in next(trap.text for trap in traps(net) if trap.kind == "turn")
    net = with_tokenizer(net, chat_template="{{ raise_exception('system first') }}")
    assert "system first" in next(trap.text for trap in traps(net) if trap.kind == "template")
    assert examine(net).turn_end is None


def test_traps_of_texts() -> None:
    net = tiny()
    letters = {word: at for at, word in enumerate(["<s>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz\n"])}
    made = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    net.tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")
    assert {"eos", "lossy", "prefix", "unnamed", "pad"} <= set(kinds(net))


def test_traps_of_sizes() -> None:
    net = tiny()
    rows = len(net.tokenizer)
    assert not {"outside", "unnamed", "embeddings"} & set(kinds(net))
    net.anatomy = replace(net.anatomy, vocabulary=rows - 2)
    assert "outside" in kinds(net)
    net.model.get_input_embeddings().weight.data = torch.zeros(rows - 3, 32)
    assert "embeddings" in kinds(net)
    with_tokenizer(net, pad_token="<pad>")
    net.tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert "has no embedding" in next(trap.text for trap in traps(net) if trap.kind == "pad")


def test_a_cap_is_found() -> None:
    net = tiny()
    net.model.config.final_logit_softcapping = 2.0
    forward = net.model.forward

    def capped(*given: Any, **named: Any) -> Any:
        output = forward(*given, **named)
        output.logits = torch.tanh(output.logits / 2.0) * 2.0
        return output

    net.model.forward = capped
    assert examine(net).logits.cap == 2.0


def test_needs_grow_with_what_is_kept_and_written() -> None:
    net = tiny()
    found = {need.settings: need for need in needs(net, SPEED, 1 << 40)}
    whole, last, star = (found[f"--method {name}"] for name in ("minkl", "minkl --layers last", "star"))
    assert last.bytes <= whole.bytes
    assert last.seconds < whole.seconds
    assert 0 < star.statistics_seconds <= whole.statistics_seconds
    plan = planned(net, MinKl().asks())
    assert whole.statistics_seconds >= plan.length * SPEED.step + 3 * plan.tokens * SPEED.text
    assert all(need.fits for need in found.values())
    assert not any(need.fits for need in needs(net, SPEED, 1000))
    slower = Speed(*(2 * value for value in astuple(SPEED)))
    assert needs(net, slower, 0)[0].seconds == pytest.approx(2 * whole.seconds)
    assert STAGES[0] + 1 == GATE  # the gate's first stage, and the token that starts a text


@pytest.mark.parametrize("kind", ["full", "blocks", "sampled", "diagonal"])
def test_moments_are_counted_as_they_are_kept(kind: str) -> None:
    net, asked = mixtures.net("mixtral"), Asked(kind, "full", 50, 0.01)
    tokens = net.tokenize([replace(FAILURES[0], target=" with open(path, encoding) as file")])
    sums = Sums.of(net, tokens, asked, 0)
    assert all(done for done, _ in sums.read())
    plan = planned(net, asked, 0, len(tokens[0].ids) - 1)
    parts = [part for one in (*sums.inputs.values(), *sums.outputs.values()) for part in one.parts]
    assert _sums(net, plan) == sum(4 * part.numel() for part in parts)
    made = sums.statistics("")
    inverses = [moment.inverse(0.01) for both in (made.inputs, made.outputs) for moment in both.values()]
    counted = _numbers(_moments(net, plan), len(tokens[0].ids) - 1)
    assert counted == sum(one.values.numel() for one in inverses)


def test_a_mixture_takes_the_time_of_its_blocks() -> None:
    net = mixtures.net("mixtral")
    plans = {kind: planned(net, Asked(kind, "full", 50, 0.01), 1) for kind in ("full", "blocks", "diagonal")}
    gathering = {kind: _gathering(net, plan, True, SPEED) for kind, plan in plans.items()}
    factoring = {kind: _factoring(net, plan, net.every_site(), 50, SPEED) for kind, plan in plans.items()}
    for each in (gathering, factoring):
        assert each["full"] > each["blocks"] > each["diagonal"]
    # Two layers of four experts of 48 columns: 4·48³/3 instead of nothing, at so many operations a second.
    apart = factoring["blocks"] - factoring["diagonal"]
    assert apart == pytest.approx(2 * 4 * 48**3 / 3 / _rate(net, SPEED))


def test_engines_are_asked_as_an_export_asks_them() -> None:
    net = tiny()
    assert [one.refused for one in served(net)] == ["", "", ""]
    net.model.config.model_type = "no_such_model"
    assert "llama.cpp has no architecture 'no_such_model'" in served(net)[1].refused
    net.source = Source("gguf", "0" * 64, "Q4_0")
    assert served(net)[1].refused == ""
    net.anatomy = replace(net.anatomy, ffns=tuple(replace(place, name="down") for place in net.anatomy.ffns))
    assert "no layer's number" in served(net)[0].refused


def test_adapters_for_experts_are_not_promised() -> None:
    peft, gguf, merged = served(mixtures.net("mixtral"))
    assert peft.refused == gguf.refused
    assert peft.refused.startswith("layers [0, 1] are mixtures of experts, and adapters for experts are not written")
    assert merged.refused == ""


def test_the_command(run: Run) -> None:
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    assert "model.layers.N.mlp.down_proj: 6 layers of 512 neurons" in out
    assert "proved:" in out
    assert "--method minkl --layers last" in out
    assert "--to merged" in out
    code, out, _ = run("doctor", "--json")
    data = json.loads(out)
    assert code == 0
    assert data["model"] == "embedded"
    assert "--method minkl" in data["fits"]
    code, _, err = run("doctor", "--model", "nowhere/at-all-x")
    assert code == 2
    assert err.startswith("lmrepair: error:")
