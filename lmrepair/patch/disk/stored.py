"""Checkpoints as they lie on the disk: which tensor is where in which safetensors file.

Read with plain offsets, never through a mapping: a file that is mapped while it is replaced reads as zeros.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lmrepair.errors import ModelError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHUNK = 1 << 24  # bytes read at once
HEADER_LIMIT = 100_000_000  # as in the safetensors library
LONGEST = 255  # bytes of a file's name, on the file systems that there are


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint: ``file``, and the bytes ``start`` to ``end`` of that file, row-major."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None for a dtype that no patch can be in (integers, eight bits)."""
        return DTYPES.get(self.dtype)

    def read(self, file: BinaryIO | None = None) -> Tensor:
        """The tensor, read from its file (or from another one that has it in the same place)."""
        if file is None:
            with self.file.open("rb") as opened:
                return self.read(opened)
        raw = bytearray(self.end - self.start)
        file.seek(self.start)
        if file.readinto(raw) != len(raw):  # type: ignore[attr-defined]
            raise ModelError(f"{self.file}: ends inside {self.name}; take the file from its source again")
        return torch.frombuffer(raw, dtype=DTYPES[self.dtype]).reshape(self.shape)

    def row(self, file: BinaryIO, index: int) -> Tensor:
        """One row of a matrix."""
        width = self.shape[1] * DTYPES[self.dtype].itemsize
        start = self.start + index * width
        part = Stored(self.file, self.name, self.dtype, self.shape[1:], start, start + width)
        return part.read(file)

    def digest(self, as_dtype: torch.dtype | None = None) -> str:
        """SHA-256 as ``lmrepair.model.digest`` takes it of the tensor in memory, a part at a time."""
        kind = DTYPES[self.dtype]
        state = hashlib.sha256(f"{as_dtype or kind} {self.shape}".encode())
        with self.file.open("rb") as file:
            file.seek(self.start)
            left = self.end - self.start
            while left:
                part = file.read(min(CHUNK, left))
                if not part:
                    raise ModelError(f"{self.file}: ends inside {self.name}; take the file from its source again")
                left -= len(part)
                if as_dtype not in (None, kind):
                    values = torch.frombuffer(bytearray(part), dtype=kind).to(as_dtype)
                    state.update(values.view(torch.uint8).numpy().data)
                else:
                    state.update(part)
        return state.hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files that a model folder is loaded from, and their tensors by name."""

    folder: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, Stored]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Find the files that transformers would load, and read their headers.

    Raises ModelError for a folder without safetensors, with shards but no index, with a shard that is
    missing or damaged, or with a tensor that is not where the index says.
    """
    index = folder / INDEX
    if (folder / SINGLE).exists():
        names: Mapping[str, str] | None = None
        files = [folder / SINGLE]
    elif index.exists():
        names = _read_index(index)
        files = [folder / name for name in sorted(set(names.values()))]
    else:
        raise _no_weights(folder)
    tensors: dict[str, Stored] = {}
    for file in files:
        if not file.exists():
            raise ModelError(f"{file}: no such file, and {INDEX} names it; the checkpoint is not complete")
        for found in read_header(file):
            if names is None or names.get(found.name) == file.name:
                tensors[found.name] = found
    lost = sorted(set(names or ()) - set(tensors))
    if lost:
        raise ModelError(f"{index}: {lost[0]} is not in {(names or {})[lost[0]]}; index and shards do not fit")
    return Checkpoint(folder, tuple(files), tensors)


def _no_weights(folder: Path) -> ModelError:
    others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if sorted(folder.glob("*.safetensors")):
        shards = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))[:3])
        return ModelError(f"{folder}: {shards}, but neither {SINGLE} nor {INDEX}; the checkpoint lacks its index")
    if others:
        return ModelError(
            f"{folder}: its weights are in {others[0]}, which is no safetensors; convert them first: python -c "
            f"\"from transformers import AutoModelForCausalLM as A; A.from_pretrained('{folder}', "
            "dtype='auto').save_pretrained('converted')\""
        )
    return ModelError(f"{folder}: no {SINGLE} and no {INDEX} in it; expected a Hugging Face model folder")


def _read_index(path: Path) -> Mapping[str, str]:
    try:
        found = json.loads(path.read_bytes())["weight_map"]
        if not isinstance(found, dict) or not found:
            raise TypeError("weight_map is no table")
        for name, file in found.items():
            proper = isinstance(file, str) and Path(file).name == file and len(file.encode()) <= LONGEST
            if not proper or not file.endswith(".safetensors"):
                raise ValueError(f"{name!r:.80} is in {file!r:.80}, which is no safetensors file of this folder")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{path}: not an index of shards ({error})") from error
    return found


def read_header(path: Path) -> Iterator[Stored]:
    """The tensors of one safetensors file, in the order of its header. Raises ModelError for one that is damaged."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = struct.unpack("<Q", file.read(8))[0]
            if not 2 <= length <= min(HEADER_LIMIT, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            record = json.loads(file.read(length))
        if not isinstance(record, dict):
            raise TypeError("the header is no table")
        for name, entry in record.items():
            if name != "__metadata__":
                yield _stored(path, name, entry, 8 + length, size)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise ModelError(f"{path}: damaged, or no safetensors file ({error})") from error


def _stored(path: Path, name: str, entry: Mapping[str, Any], origin: int, size: int) -> Stored:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    start, end = entry["data_offsets"]
    if not isinstance(dtype, str) or not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError(f"{name!r} has no proper dtype, shape and place")
    count = 1
    for number in shape:
        count *= number
    if not start <= end <= size - origin:
        raise ValueError(f"{name!r} lies outside the file")
    if dtype in DTYPES and end - start != count * DTYPES[dtype].itemsize:
        raise ValueError(f"{name!r} has {end - start} bytes, its shape {list(shape)} needs another number")
    return Stored(path, name, dtype, shape, origin + start, origin + end)


def numbered(name: str) -> list[int]:
    """The whole numbers among the dotted parts of a name."""
    return [int(part) for part in name.split(".") if re.fullmatch(r"\d{1,6}", part)]
