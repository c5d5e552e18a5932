"""What has to hold on a model that people use: placed quickly, repaired, taken back, saved as floats."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from lmrepair import Failure, Star, diagnose, load, repair
from lmrepair.model import Net
from lmrepair.model.anatomy import find
from lmrepair.patch import Patch, save_model

FAILURE = Failure(
    "# the current time in UTC\nfrom datetime import datetime, timezone\nnow = datetime", ".now(timezone.utc)"
)


def test_the_file_is_known_again(net: Net, file: Path) -> None:
    assert net.source.kind == "gguf"
    assert net.source.form == "Q4_1"
    assert net.source.digest == hashlib.sha256(file.read_bytes()).hexdigest()
    assert net.tokenizer.chat_template
    assert net.dtype == torch.float32


def test_it_is_placed_in_at_most_twelve_passes(net: Net) -> None:
    passes: list[int] = []
    handle = net.model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        found = find(net.model)
    finally:
        handle.remove()
    assert found.names == tuple(f"model.layers.{at}.mlp.down_proj" for at in range(30))
    assert set(found.widths) == {1536}
    assert found.norm is not None
    assert len(passes) <= 12


def test_a_failure_is_repaired_and_taken_back(net: Net, tmp_path: Path) -> None:
    before = [net.columns(layer).clone() for layer in range(net.layers)]
    made = repair(net, [FAILURE], Star())
    assert made.outcomes[0].repaired
    assert made.patch is not None
    made.patch.save(tmp_path / "one.safetensors")
    kept = Patch.load(tmp_path / "one.safetensors")
    assert kept.made.source == {"kind": "gguf", "digest": net.source.digest, "form": "Q4_1"}
    made.patch.revert(net)
    assert all(torch.equal(net.columns(layer), was) for layer, was in enumerate(before))


def test_bfloat16_is_placed_repaired_and_taken_back(file: Path) -> None:
    half = load(file, dtype="bfloat16")
    before = [half.columns(layer).clone() for layer in range(half.layers)]
    made = repair(half, [FAILURE], Star())
    assert made.outcomes[0].repaired
    assert made.patch is not None
    assert not diagnose(half, [FAILURE])[0].mistakes
    made.patch.revert(half)
    assert all(torch.equal(half.columns(layer), was) for layer, was in enumerate(before))


def test_it_is_saved_as_a_float_folder(net: Net, tmp_path: Path) -> None:
    save_model(net, str(tmp_path / "float"))
    again = load(tmp_path / "float")
    assert again.dtype == torch.float32
    assert torch.equal(again.columns(29), net.columns(29))
    assert [item.mistakes for item in diagnose(again, [FAILURE])] == [
        item.mistakes for item in diagnose(net, [FAILURE])
    ]
