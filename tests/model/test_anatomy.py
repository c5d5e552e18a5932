"""Placing the parts of models by shape and behaviour: right, or refused with what was looked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lmrepair.errors import ModelError, NotFiniteError
from lmrepair.model.anatomy import find

LLAMA = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GPT = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GROUPED = {**LLAMA, "num_key_value_heads": 2}
OPT = {
    "vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "word_embed_proj_dim": 32,
}  # fmt: skip

GPT_LIKE = {**LLAMA, "new_decoder_architecture": False, "parallel_attn": True, "alibi": False}

PLACED: dict[str, tuple[Any, dict[str, Any], str, int]] = {
    "llama": (hf.LlamaConfig, GROUPED, "model.layers.0.mlp.down_proj", 48),
    "llama, square FFN": (hf.LlamaConfig, {**LLAMA, "intermediate_size": 32}, "model.layers.0.mlp.down_proj", 32),
    "qwen2": (hf.Qwen2Config, GROUPED, "model.layers.0.mlp.down_proj", 48),
    "qwen3": (hf.Qwen3Config, {**GROUPED, "head_dim": 8}, "model.layers.0.mlp.down_proj", 48),
    "mistral": (hf.MistralConfig, GROUPED, "model.layers.0.mlp.down_proj", 48),
    "gpt2": (hf.GPT2Config, GPT, "transformer.h.0.mlp.c_proj", 128),
    "codegen": (hf.CodeGenConfig, {**GPT, "rotary_dim": 4}, "transformer.h.0.mlp.fc_out", 128),
    "starcoder2": (hf.Starcoder2Config, GROUPED, "model.layers.0.mlp.c_proj", 48),
    "gpt_bigcode": (hf.GPTBigCodeConfig, GPT, "transformer.h.0.mlp.c_proj", 128),
    "gpt_neox": (hf.GPTNeoXConfig, LLAMA, "gpt_neox.layers.0.mlp.dense_4h_to_h", 48),
    "phi": (hf.PhiConfig, LLAMA, "model.layers.0.mlp.fc2", 48),
    "phi3": (hf.Phi3Config, LLAMA, "model.layers.0.mlp.down_proj", 48),
    "gemma": (hf.GemmaConfig, {**GROUPED, "head_dim": 8}, "model.layers.0.mlp.down_proj", 48),
    "gemma2": (hf.Gemma2Config, {**GROUPED, "head_dim": 8}, "model.layers.0.mlp.down_proj", 48),
    "opt": (hf.OPTConfig, OPT, "model.decoder.layers.0.fc2", 48),
    "gptj": (hf.GPTJConfig, {**GPT, "rotary_dim": 4}, "transformer.h.0.mlp.fc_out", 128),
    "olmo, norms without a gain": (hf.OlmoConfig, GROUPED, "model.layers.0.mlp.down_proj", 48),
    "nanochat, norms without a gain": (hf.NanoChatConfig, GROUPED, "model.layers.0.mlp.fc2", 48),
    "falcon, adds in place": (hf.FalconConfig, {**GPT_LIKE, "ffn_hidden_size": 48}, "transformer.h.0.mlp.dense_4h_to_h",
                              48),
    "bert as a decoder": (hf.BertConfig, {**LLAMA, "is_decoder": True}, "bert.encoder.layer.0.output.dense", 48),
    "qwen3.5, recurrent and attention blocks": (hf.Qwen3_5TextConfig, {
        **GROUPED, "head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 4, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
        "model.layers.0.mlp.down_proj", 48),
    "gemma4, wider than its per-layer projection": (hf.Gemma4TextConfig, {
        **GROUPED, "head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64, "num_kv_shared_layers": 0, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"]}, "model.layers.0.mlp.down_proj", 48),
    "bloom": (hf.BloomConfig, {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
              "transformer.h.0.mlp.dense_4h_to_h", 128),
}  # fmt: skip

REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "mamba": (hf.MambaConfig, {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, "FFN"),
    "bert": (hf.BertConfig, LLAMA, "an encoder"),
    "opt with a projection": (hf.OPTConfig, {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
                              "the head reads states of width 16"),
}  # fmt: skip


def build(config: Any, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(config(**settings)).eval()


@pytest.mark.parametrize("name", PLACED)
def test_placed(name: str) -> None:
    config, settings, wanted, width = PLACED[name]
    model = build(config, settings)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = find(model)
    assert found.names[0] == wanted
    assert found.widths == (width, width)
    assert (found.hidden, found.vocabulary) == (32, 64)
    assert found.projections[1] is model.get_submodule(found.names[1])
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    config, settings, said = REFUSED[name]
    with pytest.raises(ModelError, match=said):
        find(build(config, settings))


@pytest.mark.parametrize(
    ("name", "norm"), [("llama", "model.norm"), ("gpt2", "transformer.ln_f"), ("gemma", "model.norm")]
)
def test_the_gain_is_what_the_final_norm_multiplies_by(name: str, norm: str) -> None:
    config, settings, *_ = PLACED[name]
    model = build(config, settings)
    weight = model.get_submodule(norm).weight
    with torch.no_grad():
        weight.copy_(torch.randn(32))
    wanted = weight.detach() + (1.0 if name == "gemma" else 0.0)
    assert torch.allclose(find(model).gain, wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "behind"),
    [("llama", None), ("gpt2", None), ("opt", None), ("gemma2", "model.layers.{}.post_feedforward_layernorm")],
)
def test_the_norms_between_the_ffns_and_the_stream(name: str, behind: str | None) -> None:
    """Dropout and activations read an FFN's output too, or have no parameters, and are no such norms."""
    model = build(*PLACED[name][:2])
    found = find(model).behind
    assert len(found) == 2
    for layer, norm in enumerate(found):
        assert (norm is None) == (behind is None)
        if norm is not None and behind is not None:
            assert norm.module is model.get_submodule(behind.format(layer))
            assert torch.allclose(norm.gain, 1 + norm.module.weight, atol=1e-4)  # Gemma's gains are kept less one


def test_an_encoder_decoder_is_refused() -> None:
    config = hf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    with pytest.raises(ModelError, match="encoder-decoder"):
        find(hf.T5ForConditionalGeneration(config))


def test_weights_that_cannot_be_edited_are_refused() -> None:
    model = build(*PLACED["llama"][:2])
    model.config.quantization_config = {"quant_method": "gguf"}  # a mark on float weights says nothing
    assert find(model).widths == (48, 48)
    model.model.layers[0].self_attn.register_buffer("qweight", torch.zeros(4, 32, dtype=torch.int32))
    with pytest.raises(ModelError, match=r"qweight holds packed torch.int32 weights; quantised"):
        find(model)
    model = build(*PLACED["llama"][:2])
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="is torch.int8; quantised"):
        find(model)
    model = build(*PLACED["llama"][:2])
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.empty(48, 32, device="meta"))
    with pytest.raises(ModelError, match="offloaded"):
        find(model)
    from accelerate import cpu_offload

    offloaded = cpu_offload(build(*PLACED["llama"][:2]), execution_device=torch.device("cpu"))
    with pytest.raises(ModelError, match="offloaded"):
        find(offloaded)


def test_layers_that_share_a_projection_are_refused() -> None:
    model = build(*PLACED["llama"][:2])
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    with pytest.raises(ModelError, match="share one FFN output projection"):
        find(model)


def test_the_head_works_only_where_it_is_asked_about() -> None:
    """It may be most of a model: while blocks are asked it is left out, and it is as it was afterwards."""
    model, runs = build(*PLACED["llama"][:2]), []
    own = vars(model.lm_head)
    find(model)
    assert "forward" not in own
    real = model.lm_head.forward

    def counted(states: Tensor) -> Tensor:
        runs.append(len(states))
        made: Tensor = real(states)
        return made

    own["forward"] = counted
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    find(model)
    assert own["forward"] is counted
    assert 0 < len(runs) <= 3 < len(passes)


def test_passes_do_not_grow_with_depth() -> None:
    counts = []
    for layers in (2, 40):
        model = build(hf.LlamaConfig, {**LLAMA, "num_hidden_layers": layers, "intermediate_size": 32})
        passes: list[int] = []
        model.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        assert len(find(model).names) == layers
        counts.append(len(passes))
    assert counts[0] == counts[1] <= 12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_half_precision_is_placed_and_put_back(name: str, dtype: torch.dtype) -> None:
    config, settings, wanted, _ = PLACED[name]
    model = build(config, settings).to(dtype)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 3] += 300  # a stream whose last place is larger than an FFN's output
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert find(model).names[0] == wanted
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_an_ffn_that_takes_a_large_value_out_of_the_stream_is_placed() -> None:
    # Real models hold such a value at their first tokens and take it away again: the block's output is small,
    # the last place of what was added to get there is not.
    model = build(hf.LlamaConfig, {**LLAMA, "hidden_size": 512}).to(torch.bfloat16)
    block = model.model.layers[1]
    with torch.no_grad():
        model.get_input_embeddings().weight[5, 3] += 600  # the probe's first token
        for part in (block.mlp.gate_proj, block.mlp.up_proj):
            part.weight[:, 3] = torch.linspace(0.3, 1, 48)
        block.mlp.down_proj.weight *= 0.1
        block.mlp.down_proj.weight[3] = torch.linspace(1, 2, 48)
        peak = torch.zeros(1, 512, dtype=torch.bfloat16)
        peak[0, 3] = 600
        block.mlp.down_proj.weight[3] *= -613 / block.mlp(block.post_attention_layernorm(peak))[0, 3]
    assert find(model).names[1] == "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("seed", range(8))
def test_an_encoder_that_hardly_looks_around_is_refused(seed: int) -> None:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 4096, "hidden_size": 16, "intermediate_size": 32}
    model = hf.BertForMaskedLM(hf.BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)).eval()
    with pytest.raises(ModelError, match="an encoder"):
        find(model)


class Twice(nn.Module):
    """An FFN that reads its output projection's weight once more."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x) + 0.1 * x @ self.mlp.down_proj.weight[:, :32]


class Elsewhere(nn.Linear):
    """A matrix whose weight is not what runs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.kept.T  # type: ignore[operator]


def test_a_placement_that_cannot_be_proved_is_refused() -> None:
    model = build(*PLACED["llama"][:2])
    model.model.layers[1].mlp = Twice(model.model.layers[1].mlp)
    with torch.no_grad():  # the strongest column is one of those that are read twice
        model.model.layers[1].mlp.mlp.up_proj.weight[0] *= 100
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.mlp\.down_proj cannot be proved"):
        find(model)
    model = build(*PLACED["llama"][:2])
    old = model.model.layers[0].mlp.down_proj
    new = Elsewhere(48, 32, bias=False)
    new.register_buffer("kept", old.weight.detach().clone(), persistent=False)
    model.model.layers[0].mlp.down_proj = new
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.down_proj cannot be proved"):
        find(model)


def test_the_text_part_of_a_model_that_sees_is_placed() -> None:
    config = hf.Gemma3Config(
        text_config={**GROUPED, "head_dim": 8},
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": 28, "patch_size": 14},
        image_token_index=62, boi_token_index=61, eoi_token_index=60, mm_tokens_per_image=4,
    )  # fmt: skip
    torch.manual_seed(0)
    found = find(hf.Gemma3ForConditionalGeneration(config).eval())
    assert [name.endswith(f"language_model.layers.{at}.mlp.down_proj") for at, name in enumerate(found.names)] == [
        True
    ] * 2
    assert (found.vocabulary, found.context) == (64, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logits_that_are_not_finite_are_refused_with_the_first_place(dtype: torch.dtype) -> None:
    model = build(*PLACED["llama"][:2]).to(dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:] = float("nan")
    advice = "float32 or bfloat16" if dtype == torch.float16 else "damaged"
    with pytest.raises(
        NotFiniteError, match=rf"first to write NaN or infinity is model\.layers\.1\.mlp\.down_proj; .*{advice}"
    ):
        find(model)
