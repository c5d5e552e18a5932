"""What damaged files did to the readers, found by tests/hard/fuzz.py: each is our own error now."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import oracle_models
import pytest
from factored import made_up
from oracle_models import FAILURES

from lmrepair import ModelError, Patch, PatchError
from lmrepair.patch.disk.stored import INDEX, read_checkpoint
from lmrepair.patch.format import KEY, _stamp


def test_a_record_nested_thousands_of_levels_deep(tmp_path: Path) -> None:
    raw = made_up(oracle_models.net(), FAILURES[:1], share=16).serialise()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    record = json.loads(header["__metadata__"][KEY])
    record["digest"], record["drift"] = "0" * 64, "deep"
    text = json.dumps(record, separators=(",", ":")).replace('"deep"', "[" * 20_000 + "]" * 20_000)
    header["__metadata__"][KEY] = text
    head = json.dumps(header).encode()
    path = tmp_path / "p.safetensors"
    path.write_bytes(_stamp(struct.pack("<Q", len(head)) + head + raw[8 + length :]))
    with pytest.raises(PatchError, match="RecursionError"):
        Patch.load(path)


def test_an_index_that_names_a_file_no_file_system_takes(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "a" * 300 + ".safetensors"}}), encoding="utf-8")
    with pytest.raises(ModelError, match="no safetensors file of this folder"):
        read_checkpoint(tmp_path)
