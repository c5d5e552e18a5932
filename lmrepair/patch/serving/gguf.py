"""A patch as a llama.cpp LoRA: one GGUF file for the base model's GGUF, quantised or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lmrepair.errors import ModelError, UsageError, WrongModelError, nearest
from lmrepair.failures import flush, write_atomically
from lmrepair.model import LowRank, open_gguf
from lmrepair.patch.disk import said_in_one_line
from lmrepair.patch.patch import Patch
from lmrepair.patch.serving.factors import Factors, refuse_experts

FAR = 0.7  # relative distance of the base's neurons from the patch's originals; 4 bits make 0.1, another model 1.4


@dataclass(frozen=True)
class Base:
    """What a GGUF adapter needs to know of its base: architecture, and each layer's FFN output projection [d, m].

    ``path`` is None where the base is known by its architecture alone.
    """

    architecture: str
    widths: Mapping[int, int]
    path: Path | None = None


def gguf_package() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise UsageError("the package gguf is not installed; pip install 'lmrepair[gguf]'") from error
    return gguf


def name_of(layer: int) -> str:
    """A layer's FFN output projection, as every GGUF calls it. Its neurons are in the order that transformers has."""
    return f"blk.{layer}.ffn_down.weight"


def read_base(path: Path, patch: Patch) -> Base:
    """Architecture and widths of a GGUF, checked against a patch.

    Raises ModelError for a file that is no model in GGUF, WrongModelError where the base has other shapes, or
    holds neurons that are further from the patch's originals than any quantisation takes them.
    """
    refuse_experts(patch.mixtures)
    gguf = gguf_package()
    try:
        reader = open_gguf(path)
        field = reader.fields["general.architecture"]
        architecture = str(field.contents())
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ModelError(f"{path}: cannot be read as a model in GGUF ({error})") from error
    widths = {}
    for layer in patch.changes:
        tensor = tensors.get(name_of(layer))
        if tensor is None:
            raise WrongModelError(f"{path}: no {name_of(layer)} in it; the patch changes that layer")
        width, height = (int(number) for number in tensor.shape)
        if height != patch.width:
            raise WrongModelError(f"{path}: {name_of(layer)} writes width {height}, the patch's model {patch.width}")
        widths[layer] = width
    first = min(patch.changes)
    _refuse_far(path, patch, first, gguf, tensors[name_of(first)])
    return Base(architecture, widths, path)


def _refuse_far(path: Path, patch: Patch, layer: int, gguf: ModuleType, tensor: Any) -> None:
    stored: Tensor = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()
    change = patch.changes[layer]
    if isinstance(change, LowRank):  # holds no originals that could be compared
        return
    if int(change.columns[-1]) >= stored.shape[1]:
        raise WrongModelError(f"{path}: {name_of(layer)} has {stored.shape[1]} neurons, fewer than the patch changes")
    found, wanted = stored.T[change.columns], change.originals.float()
    if float((found - wanted).norm()) > FAR * float(wanted.norm()):
        raise WrongModelError(
            f"{path}: layer {layer} is not, in any quantisation, that of the patch's model {patch.made.model!r}"
        )


def known_architecture(name: str) -> str:
    """The name if llama.cpp knows it. Raises UsageError with the nearest one if not."""
    names = set(gguf_package().MODEL_ARCH_NAMES.values())
    if name not in names:
        raise UsageError(
            f"llama.cpp has no architecture {name!r} ({nearest(name, names)}); "
            "name the base with --base model.gguf, or the architecture with --architecture"
        )
    return name


def save_gguf(factors: Factors, architecture: str, output: Path, force: bool = False) -> None:
    """Write the adapter: ``adapter.lora.alpha`` is the largest rank, and B of a layer of less rank is scaled for it.

    Raises UsageError for an output that exists (unless ``force``) or cannot be written; then nothing is.
    """
    gguf = gguf_package()
    if output.is_dir() or (output.exists() and not force):
        raise UsageError(f"{output} exists already; expected a file that is not there yet (--force replaces it)")
    tensors = {}
    for layer, (a, b) in sorted(factors.layers.items()):
        tensors[f"{name_of(layer)}.lora_a"] = a.contiguous()
        # llama.cpp multiplies by alpha / the layer's rank
        tensors[f"{name_of(layer)}.lora_b"] = (b * (len(a) / factors.rank)).contiguous()

    def fill(path: Path) -> None:
        writer = gguf.GGUFWriter(str(path), architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(factors.rank))
        for name, values in tensors.items():
            writer.add_tensor(name, values.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _refuse_cut(path, tensors)

    with said_in_one_line(output):
        write_atomically(output, fill)


def _refuse_cut(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read back what was written: of a disk that is full numpy says nothing. Raises OSError."""
    flush(path)
    try:
        found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in open_gguf(path).tensors}
    except (ModelError, ValueError, KeyError, IndexError):
        found = {}
    if found.keys() != tensors.keys() or not all(torch.equal(found[name], tensors[name]) for name in tensors):
        raise OSError("it came back from the disk other than written: is that full?")
