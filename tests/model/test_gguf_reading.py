"""What is read faster than gguf and transformers read it is what they read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import modeling_gguf_pytorch_utils as reading

from lmrepair.model.loading.gguf_file import _in_wide_rows, parsed_once

QUANTISED = [gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q5_0", "Q8_0")]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "arrays.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.name", "a name with ü")
    writer.add_float32("llama.rope.freq_base", 0.1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "", "ß and 雨", "</s>"])
    writer.add_array("tokenizer.ggml.scores", [0.1, -1e30, 3.5, 0.0])
    writer.add_array("tokenizer.ggml.token_type", [1, 3, 6, 2])
    writer.add_array("some.truths", [True, False])
    writer.add_array("one.text", ["alone"])
    writer.add_array("some.bytes", b"\x00\xff")
    writer.add_tensor("token_embd.weight", np.arange(12, dtype=np.float32).reshape(4, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _fields(path: Path) -> dict[str, Any]:
    """As transformers takes them: a list of one is the one."""
    reader = gguf.GGUFReader(str(path))
    found = {key: reading.read_field(reader, key) for key in reader.fields}
    return {key: value[0] if len(value) == 1 else value for key, value in found.items()}


def test_the_header_is_read_as_it_was(file: Path) -> None:
    plain = _fields(file)
    with parsed_once():
        fast = _fields(file)
    assert fast == plain
    assert len(plain) > 9
    assert _types(fast) == _types(plain)
    assert plain["tokenizer.ggml.tokens"] == ["a", "", "ß and 雨", "</s>"]


def _types(fields: dict[str, Any]) -> dict[str, list[type]]:
    return {key: [type(value), *(map(type, value) if isinstance(value, list) else ())] for key, value in fields.items()}


def test_the_tensors_are_those_of_the_file(file: Path) -> None:
    with parsed_once():
        (tensor,) = gguf.GGUFReader(str(file)).tensors
        assert gguf.dequantize(tensor.data, tensor.tensor_type).tolist() == np.arange(12.0).reshape(4, 3).tolist()


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("shape", [(1, 32), (7, 64), (48, 96), (1024, 64), (33, 4096), (4, 40960)])
def test_short_rows_together_are_dequantised_as_one_by_one(
    kind: gguf.GGMLQuantizationType, shape: tuple[int, int]
) -> None:
    values = np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)
    packed = gguf.quantize(values, kind)
    found = _in_wide_rows(gguf.dequantize)(packed, kind)
    assert found.shape == shape
    assert np.abs(found - values).max() < 0.5
    assert found.tobytes() == gguf.dequantize(packed, kind).tobytes()


def test_a_stack_of_matrices_and_a_vector_keep_their_shape() -> None:
    wide = _in_wide_rows(gguf.dequantize)
    for shape in ((5, 16, 32), (64,)):
        packed = gguf.quantize(np.ones(shape, dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
        assert wide(packed, gguf.GGMLQuantizationType.Q8_0).shape == shape


def test_only_what_is_made_already_is_not_copied(file: Path) -> None:
    """Weights out of a quantised form are new values; those of a float form are the file's own pages."""
    mapped = np.memmap(file, dtype=np.uint8, mode="r")
    quantised = gguf.quants.quantize(np.ones((4, 32), np.float32), gguf.GGMLQuantizationType.Q8_0)
    with parsed_once():
        made = gguf.dequantize(quantised, gguf.GGMLQuantizationType.Q8_0)
        assert reading.np.copy(made) is made
        assert np.shares_memory(reading.np.copy(made.reshape(2, -1)), made)
        turned = reading.np.copy(made.T)
        stored = gguf.dequantize(mapped[:16].reshape(2, 8), gguf.GGMLQuantizationType.F32)
        kept = reading.np.copy(stored)
        assert reading.np.float32 is np.float32
    assert not np.shares_memory(turned, made)
    assert np.shares_memory(stored, mapped)
    assert not np.shares_memory(kept, mapped)
    assert np.array_equal(kept, stored, equal_nan=True)
    assert kept.flags.writeable
    assert reading.np is np
