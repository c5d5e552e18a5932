"""A model in shards on two ranks: the patch is that of one process; ranks that do not fit are refused."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle_models import FAILURES, model, tokenizer

from lmrepair import Gate, ModelError, Patch, load, repair
from lmrepair.failures import read_kinds

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tensor_parallel.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sharded") / "tiny"
    model().save_pretrained(place)
    tokenizer().save_pretrained(place)
    return place


def ranked(folder: Path, count: int, output: Path) -> subprocess.CompletedProcess[str]:
    rows = folder.parent / "failures.jsonl"
    failure = FAILURES[0]
    rows.write_text(json.dumps({"prompt": failure.prompt, "target": failure.target, "id": failure.id}) + "\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port", "0",
               str(EXAMPLE), str(rows), "--model", str(folder), "--output", str(output), "--max-kl", "inf"]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


def test_two_ranks_make_the_patch_of_one_process(folder: Path, tmp_path: Path) -> None:
    done = ranked(folder, 2, tmp_path / "fix.safetensors")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "repaired 1 of 1" in done.stdout
    net = load(str(folder))
    alone = repair(net, FAILURES[:1], gate=Gate(float("inf"), tuple(read_kinds()))).patch
    assert alone is not None
    alone.revert(net)
    theirs = Patch.load(tmp_path / "fix.safetensors")
    assert theirs.fingerprint == alone.fingerprint  # of the whole model, though no rank held it
    for layer, change in alone.changes.items():
        assert torch.allclose(theirs.changes[layer].deltas, change.deltas, atol=1e-5)
    theirs.apply(net)
    theirs.revert(net)


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
