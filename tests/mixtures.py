"""Tiny seeded mixtures of experts of many families, and where each keeps its experts' output projections.

The table of names is the tests' own: the package finds these by shape and behaviour.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
import transformers as hf
from oracle_models import tokenizer

from lmrepair import Net

COMMON: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": None, "num_experts_per_tok": 2,
}  # fmt: skip
LOCAL = {**COMMON, "num_local_experts": 4}
FINE = {**COMMON, "num_experts": 4, "moe_intermediate_size": 24}
DEEP = {**COMMON, "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 24,
        "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}  # fmt: skip
LATENT = {**DEEP, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
          "qk_nope_head_dim": 8, "v_head_dim": 8}  # fmt: skip
SHARED = ("mlp.experts.down_proj", "mlp.shared_experts.down_proj.weight")

# Family → config, its settings, and for each layer the parameters that hold its neurons, in order.
FAMILIES: dict[str, tuple[Any, dict[str, Any], tuple[tuple[str, ...], ...]]] = {
    "mixtral": (hf.MixtralConfig, LOCAL, (("mlp.experts.down_proj",),) * 2),
    "qwen2_moe": (hf.Qwen2MoeConfig, {**FINE, "shared_expert_intermediate_size": 40},
                  (("mlp.experts.down_proj", "mlp.shared_expert.down_proj.weight"),) * 2),
    "qwen3_moe": (hf.Qwen3MoeConfig, {**FINE, "head_dim": 8}, (("mlp.experts.down_proj",),) * 2),
    "olmoe": (hf.OlmoeConfig, {**COMMON, "num_experts": 4}, (("mlp.experts.down_proj",),) * 2),
    "deepseek_v2": (hf.DeepseekV2Config, LATENT, (("mlp.down_proj.weight",), SHARED)),
    "deepseek_v3": (hf.DeepseekV3Config, LATENT, (("mlp.down_proj.weight",), SHARED)),
    "gpt_oss": (hf.GptOssConfig, {**LOCAL, "head_dim": 8, "sliding_window": 32}, (("mlp.experts.down_proj",),) * 2),
    "granitemoe": (hf.GraniteMoeConfig, LOCAL, (("block_sparse_moe.experts.down_proj",),) * 2),
    "phimoe": (hf.PhimoeConfig, LOCAL, (("mlp.experts.down_proj",),) * 2),
    "glm4_moe": (hf.Glm4MoeConfig, {**DEEP, "head_dim": 8, "n_group": 1}, (("mlp.down_proj.weight",), SHARED)),
    "llama4": (hf.Llama4TextConfig, {**LOCAL, "intermediate_size_mlp": 64, "head_dim": 8},
               (("feed_forward.experts.down_proj", "feed_forward.shared_expert.down_proj.weight"),) * 2),
    "jamba": (hf.JambaConfig, {**COMMON, "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
                               "expert_layer_period": 1, "expert_layer_offset": 0, "mamba_d_state": 4,
                               "mamba_dt_rank": 4}, (("feed_forward.experts.down_proj",),) * 2),
    "jetmoe": (hf.JetMoeConfig, {**LOCAL, "kv_channels": 8}, (("mlp.output_linear.weight",),) * 2),
}  # fmt: skip


def model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A model in evaluation mode whose preferences vary, the same for the same seed."""
    config, settings, _ = FAMILIES[family]
    torch.manual_seed(seed)
    made: Any = hf.AutoModelForCausalLM.from_config(config(**settings, vocab_size=len(tokenizer())))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "mamba" in name and parameter.dim() != 2:
                continue
            if parameter.dim() > 1:
                parameter.copy_(noise * (0.4 if "embed" in name or "lm_head" in name else 1.2 / 32**0.5))
            else:
                parameter.copy_(noise * 0.1 if name.endswith("bias") else 1 + 0.4 * noise)
        for name, buffer in made.named_buffers():
            if "correction_bias" in name:
                buffer.zero_()
    if dtype == torch.float64 and family not in ("llama4", "jetmoe"):
        made.set_experts_implementation("eager")  # the grouped products of torch take no float64
    return made.to(dtype).eval().requires_grad_(False)


def net(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Net:
    """A Net around ``model``, the caller's own."""
    return copy.deepcopy(_placed(family, seed, dtype))


@cache
def _placed(family: str, seed: int, dtype: torch.dtype) -> Net:
    return Net(model(family, seed, dtype), tokenizer(), f"tiny-{family}")


def parameters(family: str, layer: int) -> list[str]:
    """The full names of a layer's parameters that hold its neurons."""
    return [f"model.layers.{layer}.{name}" for name in FAMILIES[family][2][layer]]


def neuron_major(stored: torch.Tensor, hidden: int = 32) -> torch.Tensor:
    """[neurons, hidden] of a matrix [hidden, m], or of experts [E, hidden, m] or [E, m, hidden]."""
    if stored.dim() == 2:
        return stored.T
    if stored.shape[2] != hidden:
        stored = stored.transpose(1, 2)
    return torch.cat(list(stored))
