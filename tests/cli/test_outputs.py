"""Where results go: what is there already and is no earlier result stays."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from command import ROWS, Run, write

from lmrepair.errors import UsageError
from lmrepair.failures import shipped, write_atomically
from lmrepair.patch import Patch


@pytest.fixture
def patch(run: Run, tmp_path: Path) -> Path:
    """A patch of one failure, for the embedded model."""
    made = tmp_path / "made.safetensors"
    code, _, said = run("repair", write(tmp_path / "rows.jsonl", ROWS[0]), "--output", made, "--own-texts", "4")
    assert code == 0, said
    return made


def test_a_file_of_failures_is_never_replaced_by_a_patch(run: Run, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", ROWS[0])
    before = rows.read_bytes()
    code, _, said = run("repair", rows, "--output", rows)
    assert code == 2
    assert "is no patch" in said
    assert rows.read_bytes() == before


def test_a_models_weights_are_never_replaced_by_a_patch(run: Run, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(shipped("model"), model)
    before = (model / "model.safetensors").read_bytes()
    code, _, said = run(
        "repair", write(tmp_path / "rows.jsonl", ROWS[0]), "--model", model, "--output", model / "model.safetensors"
    )
    assert code == 2
    assert "is no patch" in said
    assert (model / "model.safetensors").read_bytes() == before


def test_an_earlier_patch_or_an_empty_file_may_be_replaced(run: Run, tmp_path: Path, patch: Path) -> None:
    empty = tmp_path / "empty.safetensors"
    empty.touch()
    for target in (patch, empty):
        code, _, said = run("repair", write(tmp_path / "rows.jsonl", ROWS[0]), "--output", target, "--own-texts", "4")
        assert code == 0, said
        assert Patch.load(target).layers


def test_patches_of_two_runs_do_not_share_a_folder(run: Run, tmp_path: Path, patch: Path) -> None:
    code, _, said = run("repair", write(tmp_path / "rows.jsonl", ROWS[0]), "--alone", "--output", patch.parent)
    assert code == 2
    assert "holds patches already" in said


def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match="is there and is no file"):
        write_atomically(pipe, b"bytes")
    assert pipe.is_fifo()


def test_through_a_link_what_it_leads_to_is_written(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"before")
    link.symlink_to(target)
    write_atomically(link, b"after")
    assert link.is_symlink()
    assert target.read_bytes() == b"after"


def test_a_report_takes_no_other_files_place(run: Run, tmp_path: Path) -> None:
    other = write(tmp_path / "rows.jsonl", ROWS[0])
    before = other.read_bytes()
    code, _, said = run("report", tmp_path, "-o", other)
    assert code == 2
    assert "is no HTML page" in said
    assert other.read_bytes() == before


def test_force_replaces_a_folder_whatever_the_dtype(run: Run, tmp_path: Path, patch: Path) -> None:
    """The model that ships is stored in 16 bits, its patch is of 32: the folder is written whole."""
    model, output = tmp_path / "model", tmp_path / "out"
    shutil.copytree(shipped("model"), model)
    output.mkdir()
    (output / "old").touch()
    code, _, said = run("apply", patch, "--model", model, "--output", output)
    assert code == 2
    assert "exists already" in said
    code, _, said = run("apply", patch, "--model", model, "--output", output, "--force")
    assert code == 0, said
    assert not (output / "old").exists()
    code, _, said = run("apply", patch, "--model", model, "--output", model / "inside")
    assert code == 2
    assert "inside the model folder" in said
    code, _, said = run("apply", patch, "--model", model, "--in-place")
    assert code == 2
    assert "--in-place cannot do" in said


def test_an_adapter_is_not_passed_over_without_an_engine(run: Run, tmp_path: Path, patch: Path) -> None:
    code, _, said = run("verify", patch, "--adapter", tmp_path / "none")
    assert code == 2
    assert "--engine" in said
    code, _, said = run("verify", patch, "--engine", "peft", "--model", "embedded", "--adapter", tmp_path / "none")
    assert code == 2
    assert "no adapter_config.json" in said


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("merged", ["--rank", "4", "--vllm"], "--to merged does not read --rank, --vllm"),
        ("peft", ["--base", "none.gguf"], "--to peft does not read --base"),
    ],
)
def test_what_an_export_does_not_read_is_said(kind: str, more: list[str], said: str, run: Run, tmp_path: Path) -> None:
    code, _, told = run("export", "none.safetensors", "--model", "embedded", "--to", kind, tmp_path / "out", *more)
    assert code == 2
    assert said in told
