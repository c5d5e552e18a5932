"""The header of a GGUF file, read with every count and offset checked against the file's size.

What reads the weights afterwards trusts these numbers. Layout: the GGUF specification, versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmrepair.errors import ModelError

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
LENGTH = struct.Struct("<Q")  # of a text, in front of it
LONGEST_KEY = 1 << 16  # bytes
SIZES = ("embedding_length", "feed_forward_length", "vocab_size", "attention.head_count", "attention.head_count_kv",
         "attention.key_length", "attention.value_length")  # fmt: skip


@dataclass(frozen=True)
class Header:
    """``values``: key → number, text, or the length of an array. ``types``: ggml type → numbers stored in it."""

    architecture: str
    values: dict[str, Any]
    types: dict[int, int]


def read_header(path: Path) -> Header:
    """Read and check the header of a GGUF file. Raises ModelError for a file that is none, damaged, or in parts."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
            return _Reader(raw).header(path.stat().st_size)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    except (struct.error, ValueError, LookupError, OverflowError) as error:
        raise ModelError(f"{path}: not a sound GGUF file ({error}); take it from its source again") from error


def read_array(raw: memoryview, at: int) -> tuple[list[Any], int, int]:
    """The values of an array of a GGUF header at byte ``at``, the type of one, and where the array ends.

    Raises ``struct.error`` or ValueError where the bytes end or make no sense.
    """
    reader = _Reader(raw, at)
    inner, count = reader.array_size()
    if inner == STRING:
        return reader.texts(count), inner, reader.at
    form = SCALARS[inner]
    return list(reader.take(f"<{count}{form[1:]}")), inner, reader.at


class _Reader:
    """Reads from the front; ``struct.error`` or ValueError where the file ends or makes no sense."""

    def __init__(self, raw: mmap.mmap | memoryview, at: int = 0) -> None:
        self.raw, self.at = raw, at

    def header(self, size: int) -> Header:
        if self.raw[:4] != b"GGUF":
            raise ValueError("it does not start with GGUF")
        self.at = 4
        version, tensors, keys = self.take("<IQQ")
        if version not in (2, 3):
            raise ValueError(f"version {version & 0xFFFF}; expected 2 or 3, little-endian")
        if tensors > size // 24 or keys > size // 12:
            raise ValueError(f"{tensors} tensors and {keys} keys in {size} bytes")
        values: dict[str, Any] = {}
        for _ in range(keys):
            key = self.text(LONGEST_KEY)
            if key in values:
                raise ValueError(f"the key {key[:60]!r} twice")
            values[key] = self.value(*self.take("<I"))
        architecture = values.get("general.architecture")
        if not isinstance(architecture, str):
            raise ValueError("no general.architecture")
        parts = values.get("split.count", 1)
        if parts != 1:
            raise ValueError(f"one of {parts} parts; join them with llama-gguf-split --merge")
        found = [self.tensor() for _ in range(tensors)]
        align = values.get("general.alignment", 32)
        if not isinstance(align, int) or align <= 0 or align % 8:
            raise ValueError(f"alignment {align!r}")
        start = -(-self.at // align) * align
        types: Counter[int] = Counter()
        for name, dims, kind, offset in found:
            if start + offset + _bytes(kind, dims) > size:
                raise ValueError(f"the values of {name[:60]!r} reach beyond its end: it is cut off")
            types[kind] += math.prod(dims)
        _check_sizes(architecture, values, [dims for _, dims, _, _ in found])
        return Header(architecture, values, dict(types))

    def take(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(form, self.raw, self.at)
        self.at += struct.calcsize(form)
        return found

    def text(self, longest: int | None = None) -> str:
        return self.texts(1, longest)[0]

    def texts(self, count: int, longest: int | None = None) -> list[str]:
        """In one loop, as a vocabulary has hundreds of thousands; none takes more than ``longest`` bytes."""
        raw, at, end, found = self.raw, self.at, len(self.raw), []
        most = end if longest is None else longest
        for _ in range(count):
            (length,) = LENGTH.unpack_from(raw, at)
            start, at = at + LENGTH.size, at + LENGTH.size + length
            if at > end or length > most:
                raise ValueError(f"a text of {length} bytes at {start}")
            found.append(str(raw[start:at], "utf-8"))
        self.at = at
        return found

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.take(SCALARS[kind])[0]
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"a value of type {kind}")
        inner, count = self.array_size()
        if inner in SCALARS:
            self.at += count * struct.calcsize(SCALARS[inner])
        else:
            for _ in range(count):
                (length,) = self.take("<Q")
                self.at += length
        return count

    def array_size(self) -> tuple[int, int]:
        """Of the array that begins here: the type of a value, and how many; that many fit into the file."""
        inner, count = self.take("<IQ")
        left = len(self.raw) - self.at
        if inner not in SCALARS and inner != STRING:
            raise ValueError(f"an array of type {inner}")
        if count > left // (8 if inner == STRING else struct.calcsize(SCALARS[inner])):
            raise ValueError(f"an array of {count} {'texts' if inner == STRING else 'values'} in {left} bytes")
        return inner, count

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.text(LONGEST_KEY)
        (count,) = self.take("<I")
        if not 1 <= count <= 4:
            raise ValueError(f"{name[:60]!r} has {count} dimensions")
        dims = self.take(f"<{count}Q")
        kind, offset = self.take("<IQ")
        return name, dims, kind, offset


def _bytes(kind: int, dims: tuple[int, ...]) -> int:
    """What a tensor takes in the file."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if dims[0] % block:
        raise ValueError(f"rows of {dims[0]} values in blocks of {block}")
    return math.prod(dims) // block * size


def _check_sizes(architecture: str, values: dict[str, Any], dims: list[tuple[int, ...]]) -> None:
    """Refuse a header that announces more than the file holds: a model of that size would be made first."""
    longest = max((max(shape) for shape in dims), default=0)
    announced = {key: values.get(f"{architecture}.{key}") for key in (*SIZES, "block_count")}
    for key, value in announced.items():
        most = len(dims) if key == "block_count" else longest
        if isinstance(value, int) and f"{architecture}.{key}" in values and not 0 <= value <= most:
            raise ValueError(f"{architecture}.{key} is {value}, the file's tensors have at most {most}")
