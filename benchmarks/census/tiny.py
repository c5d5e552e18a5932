"""Causal language models made tiny: any config of transformers, shrunk by what its settings mean (``sizes.toml``)."""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig

HERE = Path(__file__).parent
LARGEST = 4_000_000  # parameters of a model that counts as tiny
SPREAD = 4.0  # standard deviation of the logits that a tiny model is given: what it prefers varies


@cache
def tables() -> Mapping[str, Any]:
    """Sizes by meaning, and the settings that some types need beside them."""
    with open(HERE / "sizes.toml", "rb") as file:
        return tomllib.load(file)


def tiny_config(kind: str, vocabulary: int) -> PreTrainedConfig:
    """The config of a model type, every size of it shrunk."""
    extra = tables().get("extra", {}).get(kind, {})
    settings = shrunk(CONFIG_MAPPING[kind](), vocabulary)
    return CONFIG_MAPPING[kind](**merged(settings, extra.get("set", {})))


def merged(settings: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with others in their place, config by config."""
    found = dict(settings)
    for name, value in more.items():
        found[name] = merged(found[name], value) if isinstance(value, dict) and name in found else value
    return found


def shrunk(config: PreTrainedConfig, vocabulary: int) -> dict[str, Any]:
    """The settings of a config that are to be others, by name; of nested configs too."""
    values = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    depth = next((values[name] for name in values if _fits(name, tables()["layers"]) and _whole(values[name])), None)
    chosen = _layers(values, depth)
    found: dict[str, Any] = {}
    special = vocabulary
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            found[name] = shrunk(value, vocabulary)
        elif name == "is_decoder":
            found[name] = True
        elif name.endswith(("_token_id", "_token_index")):
            if _whole(value) and value >= vocabulary:
                special -= 1
                found[name] = special
        elif isinstance(value, list | tuple) and depth is not None and len(value) == depth:
            found[name] = [*range(len(chosen))] if _numbers(value) else [value[at] for at in chosen]
        else:
            small = _small(name, value, values, len(chosen))
            if small is not None:
                found[name] = small
    return found


def _layers(values: Mapping[str, Any], depth: int | None) -> list[int]:
    """Which layers are kept: one of every kind that the config's lists tell, and at least as many as the table says."""
    least = int(tables()["layers"]["count"])
    if depth is None:
        return list(range(least))
    lists = [value for value in values.values() if isinstance(value, list | tuple) and len(value) == depth]
    lists = [value for value in lists if not _numbers(value)]
    kinds: dict[str, int] = {}
    for at in range(depth):
        kinds.setdefault(str([value[at] for value in lists]), at)
    rest = [at for at in reversed(range(depth)) if at not in kinds.values()]
    return sorted([*kinds.values(), *rest[: max(0, min(least, depth) - len(kinds))]])


def _numbers(value: Sequence[Any]) -> bool:
    """Whether a list tells the layers by their numbers, all of them."""
    return list(value) == [*range(len(value))]


def _small(name: str, value: Any, values: Mapping[str, Any], layers: int) -> Any:
    if _fits(name, tables()["layers"]) and _whole(value):
        return min(layers, value)
    row = next((row for row in tables()["size"] if _fits(name, row)), None)
    if value is None and row is not None and row.get("unset"):
        return row["value"]
    if _whole(value):
        if row is None or value <= 0:
            return None
        if row.get("shared_heads") and value == _heads(values):
            return 4
        return min(row["value"], value)
    row = next((row for row in tables()["scale"] if _fits(name, row)), None)
    return row["value"] if row is not None and isinstance(value, float) else None


def _heads(values: Mapping[str, Any]) -> int | None:
    return next((values[name] for name in ("num_attention_heads", "n_heads", "n_head") if name in values), None)


def _fits(name: str, row: Mapping[str, Any]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in row["names"])


def _whole(value: Any) -> bool:
    return type(value) is int


def tiny_model(kind: str, vocabulary: int, seed: int = 0) -> Any:
    """A model of a type with random weights, in evaluation mode; logits spread by SPREAD.

    Raises ValueError for one that is not tiny.
    """
    torch.manual_seed(seed)
    config, part = tiny_config(kind, vocabulary), tables().get("extra", {}).get(kind, {}).get("part")
    factory: Any = AutoModelForCausalLM
    if part is None:
        model = factory.from_config(config, dtype=torch.float32)
    else:
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](getattr(config, part))
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} parameters; sizes.toml does not know some size of it")
    enliven(model, seed)
    return model.eval().requires_grad_(False)


def enliven(model: Any, seed: int) -> None:
    """Weights large enough, and gains and biases random enough, that what the model prefers varies."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise / min(parameter.shape[-1], parameter.shape[-2]) ** 0.5)


def spread(model: Any, norm: Any, gain: Tensor) -> None:
    """Scale what the head reads until the logits of a short text have the standard deviation SPREAD, or meet a cap.

    By the gain of the final norm, if there is one, as embeddings that are tied to the head would drown the blocks.
    """
    ids = torch.arange(8)[None] * 7 + 5
    weight = getattr(norm, "weight", None)
    with torch.no_grad():
        for _ in range(2):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            factor = SPREAD / float(logits.float().std())
            if weight is None:
                model.get_output_embeddings().weight.mul_(factor)
            else:
                weight.add_((factor - 1) * gain)  # of a norm that multiplies by 1 + weight, too
                gain = factor * gain
