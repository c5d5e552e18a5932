"""Tensors kept on disk under a key: what is damaged, or for something else, is as good as missing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lmrepair.errors import UsageError
from lmrepair.failures import write_atomically
from lmrepair.model.process import uninterrupted

UNWRITABLE = (OSError, safetensors.SafetensorError, UsageError)
UNREADABLE = (OSError, safetensors.SafetensorError, ValueError, RecursionError)

Packed = tuple[Mapping[str, Tensor], dict[str, Any]]  # tensors by name, and a record beside them


def cache_folder() -> Path:
    """Where what was read once is kept: LMREPAIR_CACHE, or lmrepair in the user's cache folder."""
    chosen, above = os.environ.get("LMREPAIR_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if chosen or above:
        return Path(chosen) if chosen else Path(str(above)) / "lmrepair"
    try:
        return Path.home() / ".cache" / "lmrepair"
    except RuntimeError:  # a user without a home: no folder at all, where nothing is found and nothing can be kept
        return Path(os.devnull) / "lmrepair"


class OnDisk(Mapping[str, Tensor]):
    """The tensors of a file, each read when it is asked for; ``file`` is open, so that they stay even if it is removed
    or replaced.
    """

    def __init__(self, path: Path) -> None:
        file: Any = safetensors.safe_open(str(path), framework="pt")
        self.path, self.file, self.names = path, file, frozenset(file.keys())
        record = json.loads((file.metadata() or {}).get("lmrepair", "{}"))
        self.record: dict[str, Any] = record if isinstance(record, dict) else {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        with uninterrupted():  # else torch makes a ValueError of a Ctrl-C that comes while it wraps the storage
            found: Tensor = self.file.get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def anew(self) -> Mapping[str, Tensor]:
        """The same, of whose pages none is held yet; itself where the file is no longer there."""
        with suppress(*UNREADABLE):
            again = OnDisk(self.path)
            if again.record == self.record:
                return again
        return self


@dataclass(frozen=True)
class CachedFile:
    """Tensors with a record, under a key and a digest: what does not fit them is as good as missing."""

    path: Path
    key: str

    @staticmethod
    def of(folder: Path, name: str, wanted: Any) -> CachedFile:
        """The file in a folder of what is ``wanted``: plain values, all that its tensors depend on."""
        key = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()
        return CachedFile(folder / f"{name}-{key[:32]}.safetensors", key)

    @property
    def part(self) -> CachedFile:
        """The file of a run that is under way."""
        return CachedFile(self.path.with_suffix(".part"), self.key)

    def write(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Exception | None:
        """Write all or nothing. Where nothing can be kept, the work goes on without: gives what stood against it."""
        whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        text = json.dumps({**record, "key": self.key, "digest": _digest(whole)}, sort_keys=True)
        try:
            write_atomically(self.path, lambda to: safetensors.torch.save_file(whole, to, {"lmrepair": text}))
        except UNWRITABLE as error:
            return error
        return None

    def read(self, fit: Callable[[Mapping[str, Tensor]], bool] = bool) -> Packed | None:
        """The tensors and the record, or None where key, digest or form do not fit. Opened anew behind the look through
        all of it, so that what is held is what is read later.
        """
        try:
            tensors = OnDisk(self.path)
            record = tensors.record
            if record.get("key") != self.key or record.get("digest") != _digest(tensors) or not fit(tensors):
                return None
        except UNREADABLE:
            return None
        return tensors.anew(), record

    def remove(self) -> None:
        with suppress(OSError):
            self.path.unlink()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        state.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()
