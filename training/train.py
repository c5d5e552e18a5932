"""Train the small code model that ships in the package, from nothing, on this machine's Python.

    python training/train.py --output lmrepair/model/embedded/model
    python training/train.py --experts 8 --feed-forward 256 --output mixture    # 8 M parameters, 3 M of them active

Reads the Python standard library's source where this interpreter keeps it (no download), trains a
byte-level BPE and a Llama-type model on it, measures both on files that were left out, and writes a
Hugging Face folder: weights in float16, tokenizer, generation config, and ``training.json`` with the
recipe and the losses. ``--device cuda`` runs the same recipe on a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

BOS = "<|endoftext|>"
# Tables and test data, which are bytes rather than code.
SKIPPED = ("site-packages", "__pycache__", "encodings", "pydoc_data", "data", "cjkencodings")
HELD_OUT_SHARE = 25


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out, beside the corpus and the library versions."""

    vocabulary: int = 4096
    hidden: int = 192
    layers: int = 6
    feed_forward: int = 512  # of an expert, where there are any
    experts: int = 0
    active: int = 2
    balance: float = 0.01  # weight of the loss that spreads tokens over experts
    heads: int = 6
    key_value_heads: int = 2
    context: int = 256
    positions: int = 1024
    batch: int = 16
    steps: int = 3000
    warmup: int = 100
    learning_rate: float = 2e-3
    final_share: float = 0.02
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0


def source_files(root: Path) -> list[Path]:
    """Every UTF-8 Python file below ``root`` that is code, in a fixed order."""
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not any(part in SKIPPED for part in parts):
            found.append(path)
    return found


def held_out(path: Path, root: Path) -> bool:
    """Whether a file is left out of training: one in 25, by a hash of its place in the library."""
    name = path.relative_to(root).as_posix()
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def read(paths: list[Path]) -> list[str]:
    """The texts of the files; those that are not UTF-8 on purpose (they test decoders) are passed over."""
    texts = []
    for path in paths:
        raw = path.read_bytes()
        try:
            texts.append(raw.decode("utf-8"))
        except UnicodeDecodeError:
            continue
    return texts


def train_tokenizer(texts: list[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE that puts the BOS token before every text, as the model is trained to expect."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=recipe.vocabulary, min_frequency=2, special_tokens=[BOS], show_progress=False
    )
    bpe.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        pad_token=BOS,
        model_max_length=recipe.positions,
    )


@dataclass(frozen=True)
class Corpus:
    """All tokens in one row, each text behind a BOS, and the places where an unindented line starts."""

    tokens: torch.Tensor
    starts: torch.Tensor

    @classmethod
    def of(cls, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Corpus:
        rows = tokenizer(texts, verbose=False)["input_ids"]
        tokens = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
        newline = torch.tensor([tokenizer.decode([token]).endswith("\n") for token in range(len(tokenizer))])
        starts = torch.nonzero(newline[tokens[:-1].long()]).squeeze(1) + 1
        return cls(tokens, starts)

    def batch(self, recipe: Recipe, generator: torch.Generator) -> torch.Tensor:
        """Crops [batch, context] behind a BOS: half start at an unindented line, half anywhere."""
        width = recipe.context - 1
        limit = len(self.tokens) - width
        at_line = self.starts[torch.randint(len(self.starts), (recipe.batch // 2,), generator=generator)]
        anywhere = torch.randint(limit, (recipe.batch - len(at_line),), generator=generator)
        first = torch.cat([at_line, anywhere]).clamp(max=limit - 1)
        crops = self.tokens[first[:, None] + torch.arange(width)].long()
        return torch.cat([torch.zeros(recipe.batch, 1, dtype=torch.long), crops], dim=1)


def build(recipe: Recipe) -> LlamaForCausalLM | MixtralForCausalLM:
    """A Llama-type model, or with ``experts`` the same with a mixture of experts in every layer."""
    torch.manual_seed(recipe.seed)
    sizes: dict[str, Any] = {
        "vocab_size": recipe.vocabulary,
        "hidden_size": recipe.hidden,
        "intermediate_size": recipe.feed_forward,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.key_value_heads,
        "max_position_embeddings": recipe.positions,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if not recipe.experts:
        return LlamaForCausalLM(LlamaConfig(**sizes))
    config = MixtralConfig(
        **sizes,
        num_local_experts=recipe.experts,
        num_experts_per_tok=recipe.active,
        router_aux_loss_coef=recipe.balance,
        output_router_logits=True,
    )
    return MixtralForCausalLM(config)


@torch.no_grad()
def loss_on(model: LlamaForCausalLM | MixtralForCausalLM, corpus: Corpus, recipe: Recipe, device: str) -> float:
    """Nats per token over consecutive windows of the corpus."""
    width = recipe.context - 1
    rows = corpus.tokens[: len(corpus.tokens) // width * width].view(-1, width).long()
    rows = torch.cat([torch.zeros(len(rows), 1, dtype=torch.long), rows], dim=1)
    total = 0.0
    for part in rows.split(16):
        part = part.to(device)
        total += model(input_ids=part, labels=part).loss.item() * len(part)
    return total / len(rows)


def rate(step: int, recipe: Recipe) -> float:
    """The share of the learning rate at a step: linear warm-up, then a cosine down to the final share."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.final_share + (1 - recipe.final_share) * 0.5 * (1 + math.cos(math.pi * done))


def train(model: LlamaForCausalLM | MixtralForCausalLM, corpus: Corpus, recipe: Recipe, device: str) -> list[float]:
    """Run the recipe; returns the training loss of every step, in nats per token."""
    generator = torch.Generator().manual_seed(recipe.seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": gains, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, recipe))
    model.to(device).train()
    losses, began = [], time.perf_counter()
    for step in range(recipe.steps):
        rows = corpus.batch(recipe, generator).to(device)
        with torch.autocast(device_type=device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0 or step + 1 == recipe.steps:
            speed = (step + 1) * recipe.batch * recipe.context / (time.perf_counter() - began)
            print(f"step {step:5d}  loss {losses[-1]:.3f}  {speed:,.0f} tokens/s", flush=True)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; leave one core free")
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    output, device, threads = (arguments.pop(name) for name in ("output", "device", "threads"))
    recipe = Recipe(**arguments)
    if threads:
        torch.set_num_threads(threads)

    root = Path(sysconfig.get_paths()["stdlib"])
    files = source_files(root)
    texts = read([path for path in files if not held_out(path, root)])
    tokenizer = train_tokenizer(texts, recipe)
    corpus = Corpus.of(texts, tokenizer)
    kept_back = Corpus.of(read([path for path in files if held_out(path, root)]), tokenizer)
    model = build(recipe)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(texts)} files, {len(corpus.tokens):,} tokens, {parameters:,} parameters", flush=True)

    began = time.perf_counter()
    losses = train(model, corpus, recipe, device)
    seconds = time.perf_counter() - began
    model.half().float().eval()
    model.config.output_router_logits = False
    report = {
        "recipe": asdict(recipe),
        "parameters": parameters,
        "corpus": {
            "what": f"standard library of CPython {platform.python_version()}",
            "files": len(texts),
            "characters": sum(map(len, texts)),
            "tokens": len(corpus.tokens),
            "held_out_tokens": len(kept_back.tokens),
        },
        "loss": {
            "unit": "nats per token",
            "training_last_100_steps": round(sum(losses[-100:]) / len(losses[-100:]), 4),
            "held_out": round(loss_on(model, kept_back, recipe, device), 4),
        },
        "seconds": round(seconds),
        "device": device,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    print(json.dumps(report["loss"]))
    model.generation_config.max_new_tokens = None
    model.half().save_pretrained(output)
    tokenizer.save_pretrained(output)
    config = json.loads((output / "config.json").read_text())
    config["dtype"] = "float32"  # stored in half precision, computed with in single
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (output / "training.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
