"""A model in shards: a number of ranks that does not fit is refused. The repair itself: examples/tensor_parallel.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from oracle_models import model, tokenizer

from lmrepair import ModelError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tensor_parallel.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sharded") / "tiny"
    model().save_pretrained(place)
    tokenizer().save_pretrained(place)
    return place


def test_a_number_of_ranks_that_does_not_divide_is_refused_before_loading(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("tensor_parallel", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    with pytest.raises(
        ModelError, match=r"4 ranks do not divide the model's 2 key and value heads; expected one of 1, 2 "
    ):
        example.load(str(folder), 4)
    with pytest.raises(ModelError, match="3 ranks do not divide the model's 4 attention heads"):
        example.load(str(folder), 3)
