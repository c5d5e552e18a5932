"""Other engines asked for what they write: whether a repair holds where the model runs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmrepair.errors import ModelError, UsageError
from lmrepair.failures import Tokens
from lmrepair.model import Net
from lmrepair.patch.patch import Patch
from lmrepair.patch.serving.choice import chosen
from lmrepair.patch.serving.factors import Held, holding
from lmrepair.patch.serving.gguf import read_base, save_gguf

ENGINES = ("llama.cpp", "peft")
ROOM = 8  # tokens of context beside prompt and target
MOST_MARGIN = 24.0  # logits; beyond that a margin is not doubled


def llama_package() -> Any:
    """llama.cpp as Python has it, a module. Raises UsageError where it is not installed."""
    try:
        import xllamacpp
    except ImportError as error:
        raise UsageError("llama.cpp is not installed; pip install 'lmrepair[engines]' brings it (xllamacpp)") from error
    return xllamacpp


def llama_cpp(base: Path, adapter: Path | None, tokens: Sequence[Tokens], threads: int = 1) -> list[tuple[int, ...]]:
    """Greedy completions by llama.cpp of exact prompts (ids, not text), each as long as its target; errors as below."""
    return [tuple(token for token, _ in one) for one in llama_tokens(base, adapter, tokens, threads)]


def llama_tokens(
    base: Path, adapter: Path | None, tokens: Sequence[Tokens], threads: int = 1
) -> list[tuple[tuple[int, float], ...]]:
    """The same with the log-probability that llama.cpp gives each token.

    Raises UsageError where xllamacpp is not installed, ModelError for a model or adapter that llama.cpp does not load.
    """
    xllamacpp = llama_package()
    settings = xllamacpp.CommonParams()
    settings.model.path = str(base)
    settings.n_ctx = max(len(item.ids) for item in tokens) + ROOM
    settings.n_parallel = 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.warmup = False
    settings.verbosity = -1
    if adapter is not None:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    try:
        server = xllamacpp.Server(settings)
    except RuntimeError as error:
        what = f"{base} with {adapter}" if adapter else str(base)
        raise ModelError(f"llama.cpp does not load {what} ({error})") from error
    return [_completion(server, item) for item in tokens]


def _completion(server: Any, item: Tokens) -> tuple[tuple[int, float], ...]:
    answer = server.handle_completions(
        {
            "prompt": list(item.prompt),
            "n_predict": len(item.target),
            "temperature": 0.0,
            "repeat_penalty": 1.0,
            "logprobs": 1,
            "cache_prompt": False,
            "ignore_eos": False,
        }
    )
    if "choices" not in answer:
        raise ModelError(f"llama.cpp gives no answer to failure {item.id!r} ({answer})")
    found = answer["choices"][0]["logprobs"]["content"]
    return tuple((int(token["id"]), float(token["logprob"])) for token in found)


def held_by_llama_cpp(patch: Patch, base: Path, adapter: Path | None, rank: int = 0) -> Held:
    """How many of a patch's failures llama.cpp answers rightly over a base, with an adapter or (None) without."""
    texts = llama_cpp(base, adapter, [item.tokens for item in patch.items])
    return holding(patch, rank, [True] * len(texts), texts)


def held_over(base: Path, patch: Patch, net: Net | None, rank: str | None = None) -> Held:
    """The same with the patch as a LoRA, made for the purpose as ``export`` makes it; ``net`` as ``chosen`` takes it.

    Raises WrongModelError for a base that the patch was not made for.
    """
    found = read_base(base, patch)
    factors = chosen(patch, found.widths, net, rank).factors
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter.gguf"
        save_gguf(factors, found.architecture, adapter)
        return held_by_llama_cpp(patch, base, adapter, factors.rank)


@dataclass(frozen=True)
class Tried:
    """A repair made with a margin (logits), and what of it holds where it is served."""

    margin: float
    held: Held


def until_held(
    make: Callable[[float], Patch | None], look: Callable[[Patch], Held], margin: float, most: float = MOST_MARGIN
) -> tuple[Tried, ...]:
    """Repairs with a margin, twice that and so on up to ``most``, until all that one repairs holds where it is served.

    ``make`` gives the patch of a margin (None where nothing is repaired, which ends it), ``look`` what of it holds.
    """
    tried: list[Tried] = []
    while (patch := make(margin)) is not None:
        tried.append(Tried(margin, look(patch)))
        if not tried[-1].held.lost:
            break
        margin = max(2 * margin, 1.0)
        if margin > most:
            break
    return tuple(tried)


def best_of_tried(tried: Sequence[Tried]) -> Tried:
    """The one of which most holds; of several, that of the least margin."""
    return max(tried, key=lambda one: (one.held.kept, -one.margin))
