"""From last states to logits: the model's own, whatever follows the head."""

from __future__ import annotations

from typing import Any

import oracle_models
import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from lmrepair.failures.tokens import Tokens
from lmrepair.model.head import Head
from lmrepair.model.net import Net

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip


def grown(model: Any) -> Net:
    """Random weights large enough that a cap is felt."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return Net(model.eval().requires_grad_(False), oracle_models.tokenizer(), "grown")


def made(form: str) -> Net:
    if form == "cap":
        return grown(Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=3.0)))
    if form == "scale":
        return grown(GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)))
    net = oracle_models.net("llama")
    if form == "else":
        run = net.model.forward

        def forward(*given: Any, **named: Any) -> Any:
            output = run(*given, **named)
            output.logits = output.logits.abs()
            return output

        net.model.forward = forward
    return net


@pytest.mark.parametrize("form", ["plain", "cap", "scale", "else"])
def test_logits_of_states_are_the_models_own(form: str) -> None:
    net = made(form)
    long = Tokens("b", (0,), (40, 41, 42, 43, 44, 45, 46))
    (batch,) = net.batches([Tokens("a", (0, 5), (9, 17, 30)), long])
    seen_at_once: list[tuple[int, ...]] = []
    handle = net.model.get_input_embeddings().register_forward_hook(
        lambda _, ids, __: seen_at_once.append(ids[0].shape)
    )
    head = Head.of(net, Tokens("c", long.prompt, long.target * 9))
    handle.remove()
    assert seen_at_once == [(1, 9)]  # the first positions of a text, however long it is
    assert (head.cap, head.scale != 1, head.whole) == {
        "plain": (0.0, False, False),
        "cap": (3.0, False, False),
        "scale": (0.0, True, False),
        "else": (0.0, False, True),
    }[form]
    with torch.inference_mode():
        wanted: Tensor = net.logits(batch)
        seen = head.seen(batch)
        found = torch.cat([head.logits(seen[rows]) for rows in (slice(0, 4), slice(4, None))])
    assert seen.shape == (10, net.anatomy.vocabulary if head.whole else net.hidden)
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    with torch.inference_mode():
        rows = batch.rows[3:5]
        assert torch.allclose(head.logits(head.seen(batch, rows)), wanted[3:5], atol=1e-5)
