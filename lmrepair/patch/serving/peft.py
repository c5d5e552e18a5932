"""A patch as a PEFT adapter: a folder with LoRA factors on the FFN output projections."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from lmrepair.errors import ModelError, UsageError
from lmrepair.model import Net
from lmrepair.patch.disk import beside, place_folder, said_in_one_line
from lmrepair.patch.folder import refuse_existing
from lmrepair.patch.serving.factors import Factors


@dataclass(frozen=True)
class Modules:
    """The FFN output projections as an adapter names them, in the order of the layers.

    ``rows``: stored neuron by neuron (``Conv1D``). ``base``: the name of the model they are in.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]
    rows: bool
    base: str

    @staticmethod
    def of(net: Net) -> Modules:
        rows = isinstance(net.anatomy.projections[0], Conv1D)
        return Modules(
            net.anatomy.names, net.widths, rows, str(getattr(net.model.config, "name_or_path", "") or net.name)
        )


def peft_config(factors: Factors, modules: Modules) -> dict[str, Any]:
    """``adapter_config.json``: ``lora_alpha`` is the rank, in every layer, so that the scale is 1."""
    ranks = factors.ranks
    usual = Counter(ranks.values()).most_common(1)[0][0]
    other = {modules.names[layer]: rank for layer, rank in ranks.items() if rank != usual}
    suffixes = sorted({_suffix(modules.names[layer]) for layer in ranks})
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": modules.base,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": suffixes,
        "fan_in_fan_out": modules.rows,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
    if len(ranks) < len(modules.names):
        config["layers_to_transform"] = sorted(ranks)
    return config


def _suffix(name: str) -> str:
    """What stands behind the layer's number in a module's name."""
    match = re.search(r"\.\d+\.([^0-9]+)$", name)
    if match is None:
        raise ModelError(f"{name} has no layer's number in its name, by which an adapter could tell the layers apart")
    return match.group(1)


def save_peft(factors: Factors, modules: Modules, output: Path, force: bool = False) -> dict[str, Any]:
    """Write the adapter folder, whole or not at all; gives its config.

    Raises UsageError for an output that exists (unless ``force``) or cannot be written.
    """
    if not (force and output.is_dir()):
        refuse_existing(output)
    config = peft_config(factors, modules)
    tensors = {}
    for layer, (a, b) in factors.layers.items():
        name = f"base_model.model.{modules.names[layer]}"
        tensors[f"{name}.lora_A.weight"] = a.contiguous()
        tensors[f"{name}.lora_B.weight"] = b.contiguous()
    with said_in_one_line(output), beside(output) as temporary:
        save_file(tensors, temporary / "adapter_model.safetensors", {"format": "pt"})
        (temporary / "adapter_model.safetensors").chmod(0o644)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (temporary / "adapter_config.json").write_text(text, encoding="utf-8")
        place_folder(temporary, output)
    return config


@contextmanager
def peft_on(net: Net, folder: Path) -> Iterator[Sequence[str]]:
    """The net's model with an adapter in it, as PEFT loads it, for the length of a block; gives what it warned of."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UsageError("PEFT is not installed; pip install 'lmrepair[lora]'") from error
    if not (folder / "adapter_config.json").is_file():
        raise UsageError(f"{folder} is no adapter: it has no adapter_config.json; expected a folder of --to peft")
    wanted = [(parameter, parameter.requires_grad) for parameter in net.model.parameters()]
    wrapped = PeftModel.from_pretrained(net.model, str(folder))
    wrapped.eval()
    missing = [name for name, _ in net.model.named_modules() if name.endswith("lora_A")]
    try:
        yield missing
    finally:
        wrapped.unload()
        for parameter, needed in wanted:
            parameter.requires_grad_(needed)
