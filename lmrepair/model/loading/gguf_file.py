"""GGUF files in: float weights in memory, made from the quantised ones in the file."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers

from lmrepair.errors import ModelError
from lmrepair.model.loading.header import ARRAY, Header, read_array, read_header
from lmrepair.model.source import Source

SUFFIX = ".gguf"
WIDE = 8192  # bytes


def gguf_source(path: Path) -> Source:
    """Check a GGUF file before anything is made of it. Raises ModelError where it or a package is no good."""
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"{path}: reading a GGUF file needs the packages gguf and accelerate; pip install 'lmrepair[gguf]'"
        )
    header = read_header(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Source("gguf", digest, _form(header))


def open_gguf(path: Path) -> Any:
    """gguf's reader of a file whose header is sound, its arrays plain values. Raises ModelError for another."""
    import gguf

    read_header(path)
    return _with_plain_arrays(gguf.GGUFReader)(path)


def gguf_options(path: Path) -> dict[str, Any]:
    """What transformers is to be told: which file, and that the weights are wanted as floats, not packed."""
    config = getattr(transformers, "GgufConfig", None)  # where it is not, weights are never left packed
    unpacked = {"quantization_config": config(dequantize=True)} if config is not None else {}
    return {"gguf_file": path.name, **unpacked}


@contextmanager
def parsed_once() -> Iterator[None]:
    """transformers parses the file anew for the config, the tokenizer and the weights, and its table of names for
    every module, and shows a bar: inside the block what was parsed is kept, and there is no bar. A vocabulary is read
    as plain values (gguf makes two mapped arrays of every token: 20 s for 262,144 of them, where this takes one), and
    handed on as one of them."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    changed = (
        *_newer_reader(),
        (gguf, "GGUFReader", lambda reader: cache(_with_plain_arrays(reader, whole=True))),
        (gguf, "get_tensor_name_map", cache),
        (gguf, "dequantize", _in_wide_rows),
        (reading, "_gguf_parse_value", _unless_plain),
        (reading, "np", _Sparing),
        (reading, "tqdm", _without_bar),
    )
    kept = [(module, name, getattr(module, name)) for module, name, _ in changed]
    for module, name, change in changed:
        setattr(module, name, change(getattr(module, name)))
    try:
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


def _newer_reader() -> tuple[tuple[Any, str, Callable[[Any], Any]], ...]:
    """Newer transformers has a reader of its own, which cuts a vocabulary text by text out of a mapped array: out of
    a plain view of the same bytes that takes a fifth of the time."""
    try:
        from transformers.integrations.gguf import reader
    except ImportError:
        return ()

    return ((reader, "_mapped", lambda mapped: lambda path: memoryview(mapped(path))),)


def _with_plain_arrays(reader: Any, whole: bool = False) -> Any:
    """gguf's reader with the arrays of the header as lists of texts, numbers or truth values.

    ``whole``: a field of several values has one part, their list, as transformers takes parts one by one.
    """
    from gguf.constants import GGUFValueType

    class Plain(reader):  # type: ignore[misc]
        def _get_field_parts(self, offset: int, kind: int) -> Any:
            if kind != ARRAY:
                return super()._get_field_parts(offset, kind)
            values, inner, end = read_array(memoryview(self.data), int(offset))
            parts = [values] if whole and len(values) > 1 else values
            return end - int(offset), parts, list(range(len(parts))), [GGUFValueType.ARRAY, GGUFValueType(inner)]

    return Plain


def _in_wide_rows(dequantize: Any) -> Any:
    """gguf takes sixteen rows at a time, whatever their length: several short rows as one are half the time."""

    def wide(data: Any, kind: Any) -> Any:
        rows, each = data.shape if data.ndim == 2 else (1, WIDE)
        joined = math.gcd(rows, 1 << max(0, (WIDE // each).bit_length() - 1))
        if joined == 1:
            return dequantize(data, kind)
        return dequantize(data.reshape(rows // joined, -1), kind).reshape(rows, -1)

    return wide


class _Sparing:
    """numpy, whose ``copy`` leaves values alone that are in memory already and nobody else's: transformers copies all
    weights, those that were only just made of quantised ones too."""

    def __init__(self, numpy: Any) -> None:
        self._numpy = numpy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._numpy, name)

    def copy(self, values: Any) -> Any:
        root = values
        while isinstance(root.base, self._numpy.ndarray):
            root = root.base
        made = root.base is None and not isinstance(root, self._numpy.memmap)
        return values if made and values.flags.c_contiguous else self._numpy.copy(values)


def _unless_plain(parse: Any) -> Any:
    return lambda value, kind: value if isinstance(value, (str, int, float, list)) else parse(value, kind)


def _without_bar(bar: Any) -> Any:
    return partial(bar, disable=True)


def unmark(model: Any) -> None:
    """Take off what says that a model is quantised: its weights are floats, and it is to be saved as they are."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(model):
            delattr(model, name)
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config


def _form(header: Header) -> str:
    """The quantised form's usual name: by the file's own word, else the type that most numbers are stored in."""
    from gguf.constants import GGMLQuantizationType, LlamaFileType

    said = header.values.get("general.file_type")
    if said in {kind.value for kind in LlamaFileType}:
        return LlamaFileType(said).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    most = max(header.types, key=lambda kind: header.types[kind], default=None)
    return GGMLQuantizationType(most).name if most is not None else ""
