"""Other engines asked for what they write: whether a repair holds where the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmrepair.errors import ModelError, UsageError
from lmrepair.failures import Tokens

ENGINES = ("llama.cpp", "peft")
ROOM = 8  # tokens of context beside prompt and target


def llama_cpp(base: Path, adapter: Path | None, tokens: Sequence[Tokens], threads: int = 1) -> list[tuple[int, ...]]:
    """Greedy completions by llama.cpp of exact prompts (ids, not text), each as long as its target.

    Raises UsageError where xllamacpp is not installed, ModelError for a model or adapter that llama.cpp does not load.
    """
    try:
        import xllamacpp
    except ImportError as error:
        raise UsageError("llama.cpp is not installed; pip install 'lmrepair[engines]' brings it (xllamacpp)") from error
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


def _completion(server: Any, item: Tokens) -> tuple[int, ...]:
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
    return tuple(int(token["id"]) for token in found)
