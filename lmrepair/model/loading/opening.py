"""From what a user names to a net: which file or folder that is, on which device, in which dtype."""

from __future__ import annotations

import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub
import torch
from torch import nn
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from lmrepair.errors import ModelError, UsageError, nearest
from lmrepair.failures import shipped
from lmrepair.model.loading.checkpoint import loading, quietly, read_checkpoint
from lmrepair.model.loading.consent import ADAPTER, refuse_unasked
from lmrepair.model.loading.gguf_file import SUFFIX, gguf_options, gguf_source, parsed_once, unmark
from lmrepair.model.net import DTYPES, Net
from lmrepair.model.source import HUB, Source

EMBEDDED = "embedded"


def load(
    model: Any = None,
    tokenizer: Any = None,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    shards: str = "",
) -> Net:
    """Load a causal LM: a folder, a GGUF file, (hub:)NAME on the hub, a model object, or the embedded one (default).

    ``dtype``: float32, bfloat16, float16, or auto (what the checkpoint says). ``device``: cpu, cuda,
    cuda:1, …, or auto (cuda where there is one). Weights come from safetensors or GGUF only, and no code of
    the model's own runs without ``trust_remote_code``. ``shards``: cut for the ranks of ``ranks``, on the devices
    that these have; "tensor", "experts" for a mixture, or "fsdp". Raises ModelError for a model that cannot be loaded
    whole or placed, UsageError for an unknown dtype or device.
    """
    where, dtype = _device(device), str(dtype).removeprefix("torch.")
    if dtype not in (*DTYPES, "auto"):
        raise UsageError(f"unknown dtype {dtype!r}; {nearest(dtype, (*DTYPES, 'auto'))}")
    if isinstance(model, nn.Module):
        if tokenizer is None:
            raise UsageError("a model object needs its tokenizer beside it: load(model, tokenizer)")
        return Net(model, tokenizer)
    wanted: torch.dtype | str = "auto" if dtype == "auto" else DTYPES[dtype]
    if shards and (device != "auto" or str(model).lower().endswith(SUFFIX)):
        raise UsageError(
            "shards are of a checkpoint's folder, each on its rank's device; expected no GGUF and no device"
        )
    if str(model).lower().endswith(SUFFIX) and Path(str(model)).is_file():
        return _from_gguf(Path(str(model)), tokenizer, where, wanted, trust_remote_code)
    embedded = model is None or model == EMBEDDED
    named = str(model).startswith(HUB)
    folder = str(shipped("model")) if embedded else str(model).removeprefix(HUB)
    kind = EMBEDDED if embedded else "hub" if named or not Path(folder).is_dir() else "folder"
    options: dict[str, Any] = {}
    if kind == "hub":
        if named and Path(folder).exists():
            raise ModelError(f"{model}: {folder} lies here as well and would be taken; name one of them otherwise")
        if Path(folder).exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", folder) or folder.endswith(SUFFIX):
            raise ModelError(
                f"{folder}: no such model folder or GGUF file; expected a folder with config.json, a file "
                f"FILE{SUFFIX}, or a hub name org/name"
            )
        if _hub_is_out_of_reach():
            # What was downloaded before; else transformers retries for half a minute.
            options["local_files_only"] = True
        _refuse_adapter(folder, options)
        with quietly(), loading(_sought(folder)):
            config = cached_file(folder, "config.json", **options)
        refuse_unasked(Path(str(config)).parent, trust_remote_code)
    else:
        if not any((Path(folder) / name).exists() for name in ("config.json", ADAPTER)):
            raise ModelError(f"{folder}: no config.json in it; expected a Hugging Face model folder")
        refuse_unasked(Path(folder), trust_remote_code)
    name = EMBEDDED if embedded else _plain_name(folder)
    loaded, tokenizer, unread = read_checkpoint(folder, tokenizer, wanted, trust_remote_code, options, shards)
    return Net(_ready(loaded, None if shards else where), tokenizer, name, Source(kind, unread=unread))


def _from_gguf(path: Path, tokenizer: Any, where: torch.device, dtype: torch.dtype | str, trust: bool) -> Net:
    source = gguf_source(path)
    folder, options = str(path.absolute().parent), gguf_options(path)
    with parsed_once():
        loaded, tokenizer, unread = read_checkpoint(folder, tokenizer, dtype, trust, options)
    unmark(loaded)
    return Net(_ready(loaded, where), tokenizer, path.name, replace(source, unread=unread))


def _ready(model: Any, where: torch.device | None) -> Any:
    return (model if where is None else model.to(where)).eval().requires_grad_(False)


def _refuse_adapter(name: str, options: dict[str, Any]) -> None:
    """For a name on the hub; what lies in a folder has been looked at."""
    with quietly(), loading(_sought(name)):
        if find_adapter_config_file(name, **options) is not None:
            raise ModelError(f"{name}: is or holds an adapter; expected a whole model: merge it into its base first")


def _sought(name: str) -> str:
    return f"{name} (no folder here, so looked for on the hub)"


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
