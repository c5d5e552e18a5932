"""A tiny model as llama.cpp reads it."""

from __future__ import annotations

import json
from pathlib import Path

from lmrepair import Net


def tiny_gguf(net: Net, path: Path, stored: str = "F32") -> Path:
    """A tiny Llama as llama.cpp reads it: the converter's names, q and k permuted for its rotary pairs."""
    import gguf  # an extra: tests that need it skip before

    config, state = net.model.config, net.model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    words = sorted(net.tokenizer.get_vocab().items(), key=lambda item: item[1])
    record = json.loads(net.tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([word for word, _ in words])
    writer.add_token_types([3 if number < 2 else 1 for _, number in words])
    writer.add_token_merges([" ".join(pair) for pair in record["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    kind = getattr(gguf.GGMLQuantizationType, stored)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in state.items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2], 0)
        if heads:
            rows = tensor.shape[0] // heads // 2
            tensor = tensor.reshape(heads, 2, rows, -1).swapaxes(1, 2).reshape(tensor.shape)
        place = names.get_name(name, try_suffixes=(".weight",))
        data = tensor.float().contiguous().numpy()
        if tensor.dim() == 2 and data.shape[1] % 32 == 0:
            writer.add_tensor(place, gguf.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(place, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
