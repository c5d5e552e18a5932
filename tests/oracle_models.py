"""Tiny seeded models for the numerical tests: a Llama (Linear, gated FFN) and a GPT-2 (Conv1D, tied head); where it
matters a Gemma 3 (a norm between FFN and stream).

Their weights are large enough, and their norms' gains random enough, that what they prefer varies.
"""

from __future__ import annotations

import copy
import string
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lmrepair import Failure, Method, Net, Reference, Star
from lmrepair.failures.tokens import Tokens
from lmrepair.model.statistics import gather
from lmrepair.model.statistics.moments import Asked, Statistics

TEXT = Reference("test", ("for i in range(10):\n    print(i)\n",))
HIDDEN, WIDTH, LAYERS = 32, 48, 3
KINDS = ("llama", "gpt2")

FAILURES = [
    Failure("open the file", " with open(path)", "open"),
    Failure("sum of a list:", " sum(a)", "sum"),
    Failure("say", " hi", "say"),
    Failure("what is the length of the list called names?", " len(names)\n", "length"),
]


def bold_star(**settings: Any) -> Star:
    """STAR with steps of a stated size and nobody watching: these models say little that a step would not change."""
    return Star(**settings, max_probe_kl=float("inf"))


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over printable ASCII with a few merges; a BOS token in front of every text."""
    letters = sorted({"Ġ", "Ċ", *string.ascii_letters, *string.digits, *string.punctuation})
    merges = [("Ġ", letter) for letter in string.ascii_lowercase]
    merges += [(a, b) for a in "aeiou" for b in "lnrst"] + [(a, b) for a in "lnrst" for b in "aeiou"]
    words = ["<s>", "</s>", *letters, *(a + b for a, b in merges)]
    made = Tokenizer(models.BPE(vocab={word: at for at, word in enumerate(words)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def model(kind: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A model of one of the KINDS, or "gemma3", in evaluation mode, the same for the same seed."""
    vocabulary = len(tokenizer())
    if kind != "gpt2":
        sizes: dict[str, Any] = {
            "vocab_size": vocabulary, "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96, "bos_token_id": 0,
            "eos_token_id": 1, "tie_word_embeddings": False,
        }  # fmt: skip
        llama = kind == "llama"
        config: Any = LlamaConfig(**sizes) if llama else Gemma3TextConfig(**sizes, head_dim=8)
        made: Any = LlamaForCausalLM(config) if llama else Gemma3ForCausalLM(config)
    else:
        config = GPT2Config(
            vocab_size=vocabulary, n_embd=HIDDEN, n_inner=WIDTH, n_layer=LAYERS, n_head=4, n_positions=96,
            bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        made = GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                embeds = "embed" in name or "wte" in name or "wpe" in name or "lm_head" in name
                parameter.copy_(noise * (0.4 if embeds else 1.2 / HIDDEN**0.5))
            elif name.endswith("bias"):
                parameter.copy_(noise * 0.1)
            else:
                parameter.copy_(1.0 + 0.4 * noise)
    return made.to(dtype).eval().requires_grad_(False)


def net(kind: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> Net:
    """A Net around ``model``, the caller's own: to look for a model's parts costs ten times what a copy does."""
    return copy.deepcopy(_placed(kind, seed, dtype))


@cache
def _placed(kind: str, seed: int, dtype: torch.dtype) -> Net:
    """The net that ``net`` copies; nobody else holds it, so no test can change what another one is given."""
    return Net(model(kind, seed, dtype), tokenizer(), f"tiny-{kind}")


def statistics(given: Net, method: Method, count: int = 6, length: int = 40) -> Statistics | None:
    """What a method asks of a net that is as ``net`` made it, from texts it writes by itself; gathered once."""
    asked, kind = method.asks(), given.name.removeprefix("tiny-")
    return None if asked is None else _statistics(kind, given.model.dtype, asked, count, length)


@cache
def _statistics(kind: str, dtype: torch.dtype, asked: Asked, count: int, length: int) -> Statistics:
    return gather(net(kind, dtype=dtype), _written(kind, dtype, count, length), asked, "test")


@cache
def _written(kind: str, dtype: torch.dtype, count: int, length: int) -> list[Tokens]:
    return net(kind, dtype=dtype).sample(count, length)


def pairs(found: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Tokens as the oracle takes them: (prompt ids, target ids)."""
    return [(tokens.prompt, tokens.target) for tokens in found]


@dataclass(frozen=True)
class State:
    """Everything of a net that a repair could leave behind: weights, modes, hooks, generation settings."""

    tensors: dict[str, Tensor]
    modes: list[bool]
    wanted: list[bool]
    hooks: int
    generation: int

    @staticmethod
    def of(net: Net) -> State:
        return State(
            {name: tensor.clone() for name, tensor in net.model.state_dict().items()},
            [module.training for module in net.model.modules()],
            [parameter.requires_grad for parameter in net.model.parameters()],
            sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in net.model.modules()),
            id(net.model.generation_config),
        )

    def changed(self, net: Net) -> list[str]:
        """The names of what is not, bit for bit, as it was."""
        now = State.of(net)
        names = [name for name, tensor in self.tensors.items() if not same_bits(tensor, now.tensors[name])]
        for field in ("modes", "wanted", "hooks", "generation"):
            names += [field] * (getattr(self, field) != getattr(now, field))
        return names


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal bit for bit: NaN equals itself, 0 is not −0."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a model folder, by its name."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    return found
