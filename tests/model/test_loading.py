"""Models in: GGUF files whole or refused in one line, no code without consent, checkpoints that are a little off."""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import io
import json
import random
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import jinja2
import oracle_models
import pytest
import torch
from oracle_models import FAILURES, TEXT
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lmrepair import ModelError, Patch, Star, diagnose, load, repair
from lmrepair.errors import NotFiniteError
from lmrepair.failures import shipped
from lmrepair.model import Net, Source
from lmrepair.model.loading.consent import refuse_unasked
from lmrepair.model.loading.header import read_header
from lmrepair.patch import save_model

STAR = Star(share="1/4", learning_rate=0.1, epochs=200, margin=0.1, max_probe_kl=1e9)
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


# --- GGUF -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers, its matrices in Q8_0, with tokenizer and chat template."""
    gguf = pytest.importorskip("gguf", reason="needs the extra gguf: pip install 'lmrepair[gguf]'")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tokenizer = oracle_models.tokenizer()
    core = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    words = sorted(core["vocab"], key=core["vocab"].get)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(96)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(words))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3 if word in ("<s>", "</s>") else 1 for word in words])
    writer.add_token_merges([" ".join(pair) for pair in core["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    torch.manual_seed(0)
    for name, shape in shapes(len(words)).items():
        values = torch.randn(shape).numpy() if len(shape) > 1 else torch.ones(shape).numpy()
        if len(shape) > 1:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocabulary, 32), "output_norm.weight": (32,)}
    for at in range(2):
        for name, shape in {
            "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32), "ffn_gate": (64, 32),
            "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,),
        }.items():  # fmt: skip
            found[f"blk.{at}.{name}.weight"] = shape
    return found


def test_a_gguf_is_float_in_memory_and_known_again(file: Path, tmp_path: Path) -> None:
    import gguf

    net = load(file)
    assert (net.source.kind, net.source.form) == ("gguf", "Q8_0")
    assert net.source.digest == hashlib.sha256(file.read_bytes()).hexdigest()
    assert net.dtype == torch.float32
    (stored,) = [item for item in gguf.GGUFReader(file).tensors if item.name == "blk.1.ffn_down.weight"]
    wanted = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))
    assert torch.equal(net.columns(1).T, wanted)
    text = "open the file with open(path)"
    assert net.tokenizer.chat_template == TEMPLATE
    assert net.tokenizer(text)["input_ids"][-5:] == oracle_models.tokenizer()(text)["input_ids"][-5:]
    save_model(net, tmp_path / "float")
    again = load(tmp_path / "float")
    assert again.source.kind == "folder"
    assert all(torch.equal(a, b) for a, b in zip(net.model.parameters(), again.model.parameters(), strict=True))


def test_a_patch_remembers_the_file(tmp_path: Path) -> None:
    source = Source("gguf", "ab" * 32, "Q8_0")
    for net, said in (
        (Net(oracle_models.model(), oracle_models.tokenizer(), "tiny", source), source.data()),
        (oracle_models.net(), {}),
    ):
        made = repair(net, FAILURES[:2], STAR, TEXT)
        assert made.patch is not None
        made.patch.save(tmp_path / "patch")
        assert Patch.load(tmp_path / "patch").made.source == said
        (tmp_path / "patch").unlink()
    assert said == {}
    assert b"source" not in made.patch.serialise()  # as it was before there was such a field


def test_a_gguf_is_parsed_once_and_shows_no_bar(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gguf

    parsed = []

    class Counted(gguf.GGUFReader):
        def __init__(self, path: str) -> None:
            parsed.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    load(str(file))
    assert parsed == [str(file)]
    assert gguf.GGUFReader is Counted
    assert capsys.readouterr() == ("", "")


def test_a_damaged_gguf_is_refused_in_one_line(file: Path, tmp_path: Path) -> None:
    raw = file.read_bytes()
    made = read_header(file)
    assert made.architecture == "llama"
    end = raw.index(b"llama.block_count") + len(b"llama.block_count") + 4
    hostile = {
        "nothing": b"",
        "no magic": b"GGUX" + raw[4:],
        "an unknown version": raw[:4] + struct.pack("<I", 9) + raw[8:],
        "2^60 tensors": raw[:8] + struct.pack("<Q", 1 << 60) + raw[16:],
        "2^60 keys": raw[:16] + struct.pack("<Q", 1 << 60) + raw[24:],
        "a key of 2^62 bytes": raw[:24] + struct.pack("<Q", 1 << 62) + raw[32:],
        "a million layers": raw[:end] + struct.pack("<I", 1_000_000) + raw[end + 4 :],
        "half": raw[: len(raw) // 2],
        "one byte short": raw[:-40],
    }
    path = tmp_path / "hostile.gguf"
    for name, content in hostile.items():
        path.write_bytes(content)
        with pytest.raises(ModelError) as caught:
            read_header(path)
        assert "\n" not in str(caught.value), name
    with pytest.raises(ModelError, match=r"cut off|sound"):
        load(path)


def refusal(model: Path) -> str:
    """What is said against loading a model; empty where it loads."""
    try:
        load(model)
    except ModelError as error:
        return str(error)
    return ""


def test_no_flipped_bytes_of_a_header_end_in_anything_but_a_refusal(file: Path, tmp_path: Path) -> None:
    raw, draw = file.read_bytes(), random.Random(0)
    path = tmp_path / "flipped.gguf"
    header = raw.index(b"blk.0.attn_q.weight")
    for _ in range(200):
        content = bytearray(raw)
        for _ in range(draw.choice((1, 1, 4, 8))):
            content[draw.randrange(header + 200)] = draw.choice((0, 1, 8, 127, 255, draw.randrange(256)))
        path.write_bytes(content)
        with contextlib.suppress(ModelError):
            read_header(path)


def test_an_architecture_that_cannot_be_read_is_refused_in_one_line(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(file.read_bytes().replace(b"llama", b"lmrep"))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(path)


# --- doors ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(Path(str(shipped("model"))), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def yes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Somebody who says y to everything; what was asked."""
    asked: list[str] = []

    def answer(question: str = "") -> str:
        asked.append(question)
        return "y"

    monkeypatch.setattr(builtins, "input", answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    return asked


def set_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_code_of_a_model_does_not_run_unasked(folder: Path, tmp_path: Path, yes: list[str]) -> None:
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Evil: pass\n")
    names = {
        "AutoConfig": "evil.Evil",
        "AutoModelForCausalLM": "evil.Evil",
        "AutoTokenizer": ["evil.Evil", "evil.Evil"],
    }
    config = (folder / "config.json").read_text()
    set_json(folder / "config.json", auto_map=names, model_type="evil")
    with pytest.raises(ModelError, match="trust-remote-code"):
        load(folder)
    (folder / "config.json").write_text(config)
    set_json(folder / "tokenizer_config.json", auto_map=names, tokenizer_class="Evil")
    assert refusal(folder) == "" or "trust-remote-code" in refusal(folder)  # what it knows itself, it may load
    set_json(folder / "config.json", auto_map=names)
    assert refusal(folder) == "" or "trust-remote-code" in refusal(folder)
    assert not ran.exists()
    assert not yes
    assert sys.stdin.read() == "y\n" * 20


def test_adapters_pickles_and_kernels_are_refused(folder: Path, yes: list[str]) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/base"}))
    with pytest.raises(ModelError, match=r"an adapter .*someone/base.*merge"):
        load(folder)
    (folder / "config.json").rename(folder / "kept")
    with pytest.raises(ModelError, match="an adapter"):
        load(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "kept").rename(folder / "config.json")
    index = folder / "model.safetensors.index.json"
    for shard in ("pytorch_model.bin", "../model.safetensors", 3):
        index.write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": shard}}))
        with pytest.raises(ModelError, match="expected safetensors files beside it"):
            refuse_unasked(folder, False)
    index.unlink()
    set_json(folder / "config.json", attn_implementation="someone/kernel")
    with pytest.raises(ModelError, match="asks for the code of 'someone/kernel'"):
        refuse_unasked(folder, False)
    refuse_unasked(folder, True)
    assert not yes


def test_a_hostile_template_is_an_error_and_no_code(folder: Path, tmp_path: Path, yes: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for template in (
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ):
        tokenizer.chat_template = template
        with pytest.raises(jinja2.exceptions.SecurityError):
            tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert not yes


def test_a_damaged_tokenizer_is_refused_in_one_line(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": {"type": "Nothing"}}')
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


# --- models that are a little off ----------------------------------------------------------------------


def test_what_the_class_has_no_place_for_is_said(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "mtp.head.weight": torch.zeros(2, 2)}, folder / "model.safetensors", {"format": "pt"})
    assert load(folder).source.unread == ("mtp.head.weight",)


@pytest.mark.parametrize("pad", ["</s>", "<pad>"])
def test_a_pad_token_that_is_the_end_or_outside_the_embeddings(pad: str) -> None:
    plain, other = oracle_models.net(), oracle_models.net()
    other.tokenizer.add_special_tokens({"pad_token": pad})
    assert other.pad == (1 if pad == "</s>" else 0)
    gaps = [[m.gap for item in diagnose(net, FAILURES) for m in item.mistakes] for net in (plain, other)]
    assert gaps[0] == gaps[1]
    texts = [net.generate(net.tokenize(FAILURES)) for net in (plain, other)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logits_that_are_not_finite_are_refused_everywhere(dtype: torch.dtype) -> None:
    net = oracle_models.net(dtype=dtype)
    tokens = net.tokenize(FAILURES)
    token = tokens[1].prompt[-1]
    with torch.no_grad():
        net.model.get_input_embeddings().weight[token] = float("inf")
    with pytest.raises(NotFiniteError, match=r"first to write NaN or infinity is model\.embed_tokens"):
        diagnose(net, FAILURES)
    with pytest.raises(NotFiniteError, match="no finite numbers"):
        net.generate(tokens)
    assert not any(part._forward_hooks for part in net.model.modules())


def test_a_head_stored_apart_is_not_tied(tmp_path: Path) -> None:
    net = oracle_models.net()
    save_model(net, tmp_path / "apart")
    set_json(tmp_path / "apart" / "config.json", tie_word_embeddings=True)
    again = load(tmp_path / "apart")
    assert torch.equal(again.model.lm_head.weight, net.model.lm_head.weight)
    assert not torch.equal(again.model.lm_head.weight, again.model.get_input_embeddings().weight)


def test_a_vocabulary_wider_than_the_tokenizer() -> None:
    tokenizer = oracle_models.tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=96, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    net = Net(LlamaForCausalLM(config).eval(), tokenizer)
    with torch.no_grad():
        net.model.lm_head.weight[len(tokenizer) :] *= 50  # so that it says what the tokenizer has no text for
    found = diagnose(net, FAILURES)
    assert any(mistake.said >= len(tokenizer) for item in found for mistake in item.mistakes)
    assert all(isinstance(net.tokenizer.decode([mistake.said]), str) for item in found for mistake in item.mistakes)
    assert len(net.generate(net.tokenize(FAILURES))) == len(FAILURES)
