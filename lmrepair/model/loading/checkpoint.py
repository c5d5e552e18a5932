"""The calls of transformers that load something: nothing is asked, nothing is run without consent, all is whole."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lmrepair.errors import LmrepairError, ModelError
from lmrepair.model.loading.cutting import cut, refuse_uncut

FAULTS = (
    OSError, ValueError, LookupError, ImportError, RuntimeError, TypeError, AttributeError, AssertionError,
    ArithmeticError, MemoryError, struct.error, SafetensorError,
)  # fmt: skip


def read_checkpoint(
    source: str,
    tokenizer: Any,
    dtype: torch.dtype | str,
    trust: bool,
    options: Mapping[str, Any],
    shards: str = "",
) -> tuple[Any, Any, tuple[str, ...]]:
    """The model, its tokenizer (``tokenizer``, if that is one), and the names of the tensors it has no place for.

    ``options`` go to every call; ``shards``: how the model is cut for several ranks. Raises ModelError for what
    cannot be loaded whole.
    """
    shared = {"trust_remote_code": trust, **options}
    quantised = shared.pop("quantization_config", None)
    with quietly(), loading(source):
        config = AutoConfig.from_pretrained(source, **shared)
        if quantised is None:
            _refuse_quantised(source, config)
        plan = cut(source, config, shards) if shards else None
        own = {"quantization_config": quantised, "distributed_config": plan}
        model, unread = _model(source, config, dtype, {**shared, **own})
        if plan is not None and shards == "fsdp":
            refuse_uncut(source, model, plan)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(source, **shared)
    return model, tokenizer, unread


def _model(source: str, config: Any, dtype: torch.dtype | str, options: dict[str, Any]) -> tuple[Any, tuple[str, ...]]:
    factory: Any = AutoModelForCausalLM
    given = {key: value for key, value in options.items() if value is not None}
    model, report = factory.from_pretrained(
        source, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **given
    )
    _refuse_incomplete(source, report)
    return model, tuple(sorted(map(str, report.get("unexpected_keys") or ())))


def _refuse_quantised(source: str, config: Any) -> None:
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            raise ModelError(
                f"{source}: the model is quantised; its weights cannot be patched: use the float checkpoint "
                "or a GGUF file"
            )


def _refuse_incomplete(source: str, report: Mapping[str, Any]) -> None:
    # transformers fills what a checkpoint lacks with random values and goes on.
    for kind, advice in (
        ("missing_keys", "they would be random: is it a causal language model's checkpoint?"),
        ("mismatched_keys", "the config does not belong to these weights"),
        ("error_msgs", "the checkpoint is damaged"),
    ):
        found = sorted(str(key) for key in report.get(kind, ()) or ())
        if found:
            raise ModelError(
                f"{source}: {kind.replace('_', ' ')} ({', '.join(found[:3])}{', …' * (len(found) > 3)}); {advice}"
            )


@contextmanager
def loading(source: str) -> Iterator[None]:
    """Say in one line what transformers could not load."""
    try:
        yield
    except LmrepairError:
        raise
    except BaseException as error:
        # The tokenizers library raises bare Exceptions for files that make no sense.
        if type(error) is not Exception and not isinstance(error, FAULTS):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if "custom code" in reason or "trust_remote_code" in reason:
            raise ModelError(
                f"{source}: needs Python code of its own, which was not run; if you trust it, allow it with "
                "--trust-remote-code (trust_remote_code=True)"
            ) from error
        raise ModelError(f"{source}: cannot be loaded as a causal language model ({reason[:300]})") from error


@contextmanager
def quietly() -> Iterator[None]:
    """transformers without its progress bars and warnings, unless the user set its own verbosity."""
    if "TRANSFORMERS_VERBOSITY" in os.environ:
        yield
        return
    log = transformers.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
