"""What a model folder could make its reader run or fetch, refused before anything of it is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmrepair.errors import ModelError

ADAPTER = "adapter_config.json"


def refuse_unasked(folder: Path, trust: bool) -> None:
    """Raise ModelError for a folder that is an adapter, has shards that are no safetensors, or names code to fetch.

    Custom code of the model itself is left to transformers, which is told ``trust`` and so asks nobody.
    """
    if (folder / ADAPTER).exists():
        base = _json(folder / ADAPTER).get("base_model_name_or_path")
        raise ModelError(
            f"{folder}: holds an adapter ({ADAPTER}, made for {base!r}), whose base would be loaded with it; expected "
            "a whole model: merge the adapter into its base (PEFT: merge_and_unload) and save that, or remove it"
        )
    for index in sorted(folder.glob("*.index.json")):
        shards = _json(index).get("weight_map")
        named = shards.values() if isinstance(shards, dict) else [] if shards is None else [shards]
        for shard in named:
            if not isinstance(shard, str) or not shard.endswith(".safetensors") or Path(shard).name != shard:
                if index.name.startswith("model.safetensors"):
                    raise ModelError(f"{index}: names {shard!r} as a shard; expected safetensors files beside it")
                break
    for key, value in _settings(_json(folder / "config.json")):
        if key in ("attn_implementation", "_attn_implementation", "experts_implementation") and not trust:
            kernels = [one for one in (value.values() if isinstance(value, dict) else [value]) if "/" in str(one)]
            if kernels:
                raise ModelError(
                    f"{folder}: its config asks for the code of {kernels[0]!r}; remove {key}, or allow it with "
                    "--trust-remote-code (trust_remote_code=True)"
                )


def _settings(value: Any) -> Iterator[tuple[str, Any]]:
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield key, inner
        yield from _settings(inner)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}); expected a Hugging Face model folder") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: holds {type(found).__name__}; expected a JSON object")
    return found
