"""Placing the parts of models by shape and behaviour: right, or refused with what was looked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from lmrepair.errors import ModelError
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
    "bloom": (hf.BloomConfig, {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
              "transformer.h.0.mlp.dense_4h_to_h", 128),
}  # fmt: skip

REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "mixtral": (hf.MixtralConfig, {**GROUPED, "num_local_experts": 4}, "mixture of experts"),
    "qwen2 moe": (hf.Qwen2MoeConfig, {**GROUPED, "num_experts": 4, "moe_intermediate_size": 16,
                                      "shared_expert_intermediate_size": 16}, "mixture of experts"),
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


def test_an_encoder_decoder_is_refused() -> None:
    config = hf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    with pytest.raises(ModelError, match="encoder-decoder"):
        find(hf.T5ForConditionalGeneration(config))


def test_weights_that_cannot_be_edited_are_refused() -> None:
    model = build(*PLACED["llama"][:2])
    model.config.quantization_config = {"quant_method": "gguf"}  # a mark alone: the weights are floats
    assert len(find(model).projections) == len(model.model.layers)
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match="quantised"):
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
