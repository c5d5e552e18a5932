"""Models in: from a folder, the hub or the package, whole and in the dtype asked for, or not at all."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lmrepair.errors import ModelError, UsageError, nearest
from lmrepair.failures import shipped
from lmrepair.model.net import DTYPES, Net

EMBEDDED = "embedded"


def load(
    model: Any = None,
    tokenizer: Any = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Net:
    """Load a causal language model: a folder, a hub name, a model object, or (by default) the embedded one.

    ``dtype``: float32, bfloat16, float16, or auto (what the checkpoint says). ``device``: cpu, cuda,
    cuda:1, …, or auto (cuda where there is one). Weights come from safetensors only. Raises ModelError
    for a model that cannot be loaded whole or placed, UsageError for an unknown dtype or device.
    """
    where = _device(device)
    if dtype not in (*DTYPES, "auto"):
        raise UsageError(f"unknown dtype {dtype!r}; {nearest(dtype, (*DTYPES, 'auto'))}")
    if isinstance(model, nn.Module):
        if tokenizer is None:
            raise UsageError("a model object needs its tokenizer beside it: load(model, tokenizer)")
        return Net(model, tokenizer)
    embedded = model is None or model == EMBEDDED
    source = str(shipped("model")) if embedded else str(model)
    name = EMBEDDED if embedded else _plain_name(source)
    local = Path(source).is_dir()
    if not local and (Path(source).exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source)):
        raise ModelError(f"{source}: no such model folder; expected a folder with config.json, or a hub name org/name")
    if local and not (Path(source) / "config.json").exists():
        raise ModelError(f"{source}: no config.json in it; expected a Hugging Face model folder")
    trust: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    if not local and _hub_is_out_of_reach():
        trust["local_files_only"] = True  # what was downloaded before; else transformers retries for half a minute
    factory: Any = AutoModelForCausalLM
    with quietly(), _loading(source):
        config = AutoConfig.from_pretrained(source, **trust)
        if getattr(config, "quantization_config", None) is not None:
            raise ModelError(
                f"{source}: the model is quantised; its weights cannot be patched: use the float checkpoint"
            )
        loaded, report = factory.from_pretrained(
            source,
            config=config,
            dtype="auto" if dtype == "auto" else DTYPES[dtype],
            use_safetensors=True,
            output_loading_info=True,
            **trust,
        )
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(source, **trust)
    _refuse_incomplete(source, report)
    return Net(loaded.to(where).eval().requires_grad_(False), tokenizer, name)


def _hub_is_out_of_reach() -> bool:
    """Whether the hub's host answers no connection within seconds (behind a proxy, nobody can tell)."""
    hub = urlsplit(huggingface_hub.constants.ENDPOINT)
    if getproxies():
        return False
    try:
        socket.create_connection((hub.hostname or "", hub.port or (80 if hub.scheme == "http" else 443)), 5).close()
    except OSError:
        return True
    return False


def _plain_name(source: str) -> str:
    """How results call a model: its hub name, or the last part of its folder."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"unknown device {device!r}; expected cpu, cuda, cuda:0, … or auto") from error
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {device!r} is not here ({torch.cuda.device_count()} GPUs found); use cpu or auto")
    if where.type == "meta":
        raise UsageError("device 'meta' holds no weights; expected cpu, cuda, cuda:0, … or auto")
    return where


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
def _loading(source: str) -> Iterator[None]:
    """Say in one line what transformers could not load."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{source}: cannot be loaded as a causal language model ({reason[:300]})") from error


@contextmanager
def quietly() -> Iterator[None]:
    """transformers without its progress bars and warnings, unless the user set its own verbosity."""
    if "TRANSFORMERS_VERBOSITY" in os.environ:
        yield
        return
    log = transformers.logging
    level = log.get_verbosity()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        log.enable_progress_bar()
