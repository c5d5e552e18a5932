"""A model in shards on two ranks: the patch is that of one process, and what cannot be cut is refused first."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mixtures
import oracle_models
import pytest
import ranked
import torch
from oracle_models import FAILURES, tokenizer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, distributed

import lmrepair
from lmrepair import Gate, ModelError, Patch, UsageError, diagnose, load, repair
from lmrepair.failures import read_kinds
from lmrepair.model import fingerprint
from lmrepair.model.loading.cutting import cut
from lmrepair.model.statistics.cache import cache_folder

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "shards.py"
PATIENCE = 600  # seconds, on a machine that does much else; the ranks' own is shorter


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def under_torchrun(*arguments: object) -> str:
    """Have torchrun start the example on two ranks; what they said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def off_by(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.parametrize("kinds", [("tensor", "experts"), ("fsdp", *ranked.WRAPPED)], ids=lambda kinds: kinds[0])
def test_two_ranks_solve_for_the_change_of_one_process(kinds: tuple[str, ...], tmp_path: Path) -> None:
    folder, output = tmp_path / "models", tmp_path / "deltas"
    saved(mixtures.model("mixtral"), folder / "experts")
    for kind in ("tensor", "fsdp"):
        saved(oracle_models.model(dtype=torch.float64), folder / kind)
    cache = tmp_path / "statistics"
    ranked.on_ranks(2, cache, tmp_path / "said", ranked.deltas, folder, output, *kinds)
    models = {"by blocks": mixtures.model("mixtral"), "at once": oracle_models.model()}
    found = load_file(output)
    for kind in kinds:
        net = load(models[kind], tokenizer()) if kind in models else load(str(folder / kind))
        for name in {key.split()[-2] for key in found if key.startswith(kind)}:
            if kind == "experts":
                _written_alike(net, name, cache)
            patch = ranked.repaired(net, name, cache if kind == "experts" else None)
            for layer, change in patch.changes.items():
                # In float32 sums of two halves are rounded otherwise, and a solve makes more of it.
                bound = 1e-4 if kind == "experts" else 1e-5
                assert off_by(found.pop(f"{kind} {name} {layer}"), change.deltas) < bound, (kind, name, layer)
            with safe_open(output, "pt") as file:
                assert file.metadata()[kind] == patch.fingerprint.body  # of the whole model, though no rank held it
    assert not found


def _written_alike(net: lmrepair.Net, name: str, cache: Path) -> None:
    """What two ranks have gathered in float32 is what one process gathers, but for a text in which a token that was
    drawn fell otherwise by a rounding; the solve is compared on theirs.
    """
    there = set(cache.iterdir())
    theirs, ours = ranked.known(net, name, cache), ranked.known(net, name)
    assert theirs is not None
    assert ours is not None
    assert set(cache.iterdir()) == there
    for one, other in ((theirs.inputs, ours.inputs), (theirs.outputs, ours.outputs)):
        assert all(off_by(one[layer].diagonal, other[layer].diagonal) < 0.1 for layer in one)


def test_the_example_under_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMREPAIR_CACHE", str(tmp_path / "statistics"))  # which no other worker writes to
    folder, rows, output = (
        saved(oracle_models.model(), tmp_path / "tiny"),
        tmp_path / "rows.jsonl",
        tmp_path / "fix",
    )
    failure = FAILURES[0]
    rows.write_text(json.dumps({"prompt": failure.prompt, "target": failure.target, "id": failure.id}) + "\n")
    net = load(str(folder))
    before = fingerprint(net, {})
    made = repair(net, FAILURES[:1], gate=Gate(float("inf"), tuple(read_kinds())))
    assert made.patch is not None
    made.patch.revert(net)
    kept = set(cache_folder().iterdir())
    said = under_torchrun(rows, "--model", folder, "--output", output, "--max-kl", "inf")
    assert set(cache_folder().iterdir()) == kept  # statistics are found by the key of the whole
    theirs = Patch.load(output)
    assert f"{failure.id} {len(made.outcomes[0].before)} → 0" in said
    assert "repaired 1 of 1" in said
    assert theirs.fingerprint == made.patch.fingerprint
    assert theirs.changes.keys() == made.patch.changes.keys()
    for layer, change in made.patch.changes.items():
        assert torch.equal(theirs.changes[layer].columns, change.columns)
        assert off_by(theirs.changes[layer].deltas, change.deltas) < 1e-4
    theirs.apply(net)
    assert not any(item.mistakes for item in diagnose(net, net.tokenize(FAILURES[:1])))
    theirs.revert(net)
    assert fingerprint(net, {}) == before


class World:
    """A group of ranks that nobody is in."""

    def __init__(self, patch: pytest.MonkeyPatch, size: int) -> None:
        patch.setattr(distributed, "is_initialized", lambda: True)
        patch.setattr(distributed, "get_world_size", lambda: size)


@pytest.mark.parametrize(
    ("size", "shards", "reason"),
    [
        (3, "tensor", "3 ranks do not divide the model's 4 attention heads; expected one of 1, 2 "),
        (4, "tensor", "4 ranks do not divide the model's 2 key and value heads; expected one of 1, 2 "),
        (2, "experts", 'shards "experts"|has no plan'),
    ],
)
def test_what_cannot_be_cut_is_refused_before_weights_are_read(
    size: int, shards: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = saved(oracle_models.model(), tmp_path / "tiny")
    World(monkeypatch, size)
    (folder / "model.safetensors").write_bytes(b"")  # nothing could be read from it
    with pytest.raises(ModelError, match=reason):
        load(str(folder), shards=shards)


def test_models_without_a_plan_and_mixtures_cut_as_dense_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    World(monkeypatch, 2)
    with pytest.raises(ModelError, match="transformers has no plan for it.*load it whole"):
        cut("m", oracle_models.model("gpt2").config, "tensor")
    mixture = mixtures.model("mixtral").config
    with pytest.raises(ModelError, match='load it with shards "experts"'):
        cut("m", mixture, "tensor")
    World(monkeypatch, 8)
    mixture.num_attention_heads = mixture.num_key_value_heads = 8
    with pytest.raises(ModelError, match="8 ranks do not divide the model's 4 experts; expected one of 1, 2, 4 "):
        cut("m", mixture, "experts")


def test_ranks_are_asked_for_where_there_are_some(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="torchrun"), lmrepair.ranks():
        pass
    with pytest.raises(UsageError, match="ranks"):
        load(str(saved(oracle_models.model(), tmp_path / "tiny")), shards="tensor")
    with pytest.raises(UsageError, match="unknown shards 'tensors'; did you mean 'tensor'"):
        load(str(tmp_path / "tiny"), shards="tensors")
    with pytest.raises(UsageError, match="no device"):
        load(str(tmp_path / "tiny"), shards="tensor", device="cpu")
