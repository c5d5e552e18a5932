"""Checkpoints on the disk: only the patched bytes change, all comes back, and every moment is old or new."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import oracle_models
import pytest
import torch
from factored import digests, factored, made_up
from full_disk import LOWEST, all_writes, tried_full
from oracle_models import FAILURES, same_bits, tensors
from safetensors import safe_open
from safetensors.torch import save_file

from lmrepair import ModelError, Net, Patch, UsageError, WrongModelError, load
from lmrepair.patch import OtherDtypeError, Rewritten, Writing, rewrite, save_model
from lmrepair.patch.disk.copies import duplicate

KINDS = [
    ("llama", torch.bfloat16, "neurons"),
    ("gpt2", torch.float32, "neurons"),
    ("llama", torch.bfloat16, "factors"),
    ("gpt2", torch.float32, "factors"),
]
EXTRA = {"LICENSE": "Apache", "tokenizer.model": "\x00\x01pieces", "custom/modeling_own.py": "raise SystemExit\n"}


@cache
def made(kind: str, dtype: torch.dtype, how: str) -> bytes:
    """A patch for a tiny model: of some neurons, or of whole layers as factors."""
    net: Net = oracle_models.net(kind, dtype=dtype)
    patch = made_up(net, FAILURES[:2])
    return (factored(net, patch) if how == "factors" else patch).serialise()


def checkpoint(
    folder: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16, how: str = "neurons"
) -> tuple[Path, Patch]:
    """A model folder as people have them: shards, tensors that no class loads, other files; and its patch."""
    raw = made(kind, dtype, how)
    net = oracle_models.net(kind, dtype=dtype)
    save_model(net, folder)
    (folder / "model.safetensors").unlink()
    tensors = {name: tensor.contiguous() for name, tensor in net.model.state_dict().items()}
    if kind == "gpt2":
        del tensors["lm_head.weight"]  # tied
    down = tensors[f"{net.anatomy.names[2]}.weight"]
    tensors["mtp.layers.2.mlp.down_proj.weight"] = down.clone()  # a head that starts as a copy of the last layer
    tensors["model.layers.3.mlp.down_proj.weight"] = torch.randn(32, 48).to(dtype)  # beyond the config
    tensors["v_head.bias"] = torch.zeros(3)
    tensors["steps"] = torch.tensor([7])
    names = sorted(tensors)
    shards = {f"model-0000{at + 1}-of-00003.safetensors": names[at::3] for at in range(3)}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file, {"format": "pt", "owner": "someone"})
    weight_map = {name: file for file, held in shards.items() for name in held}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    for name, text in EXTRA.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    patch = folder.parent / "patch.safetensors"
    patch.write_bytes(raw)
    return folder, Patch.load(patch)


@pytest.mark.parametrize(("kind", "dtype", "how"), KINDS)
def test_only_the_patched_tensors_change_and_all_comes_back(
    kind: str, dtype: torch.dtype, how: str, tmp_path: Path
) -> None:
    source, patch = checkpoint(tmp_path / "source", kind, dtype, how)
    before = digests(source)
    done = rewrite(source, patch, False, tmp_path / "patched")
    assert digests(source) == before
    assert done.compared == "every weight"
    after = digests(tmp_path / "patched")
    assert after.keys() == before.keys()
    assert {name for name in before if before[name] != after[name]} == set(done.files)
    old, new = tensors(source), tensors(tmp_path / "patched")
    assert {name for name in old if not same_bits(old[name], new[name])} == set(done.names)
    net = load(tmp_path / "patched")
    assert patch.is_applied(net)
    with pytest.raises(WrongModelError, match="already applied"):
        rewrite(tmp_path / "patched", patch, False, tmp_path / "twice")
    with pytest.raises(WrongModelError, match="not applied"):
        rewrite(source, patch, True, tmp_path / "twice")
    rewrite(tmp_path / "patched", patch, True, tmp_path / "back")
    assert digests(tmp_path / "back") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "patch.safetensors", "patched", "source"]


OWN_CODE = """from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_model_with_code_of_its_own_is_compared_whole_only_where_that_may_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    source, patch = checkpoint(tmp_path / "source")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    code = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    config |= {"model_type": "own", "auto_map": code, "architectures": ["OwnModel"]}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (source / "modeling_own.py").write_text(OWN_CODE, encoding="utf-8")
    for trusted, compared in ((False, "every FFN output projection"), (True, "every weight")):
        done = rewrite(source, patch, False, tmp_path / f"{trusted}", Writing(trust_remote_code=trusted))
        assert done.compared == compared


@pytest.mark.parametrize("shards", [1, 3])
def test_in_place_is_the_same_and_leaves_nothing_beside(shards: int, tmp_path: Path) -> None:
    source, patch = checkpoint(tmp_path / "source")
    if shards == 1:
        save_file(tensors(source), source / "model.safetensors", {"format": "pt"})
        for path in source.glob("model-*"):
            path.unlink()
    before = digests(source)
    shutil.copytree(source, tmp_path / "linked", copy_function=os.link)
    rewrite(source, patch, False, tmp_path / "patched")
    done = rewrite(source, patch, False, None)
    assert done.output == source
    assert digests(source) == digests(tmp_path / "patched") != before
    assert digests(tmp_path / "linked") == before  # a hard link elsewhere keeps what it had
    rewrite(source, patch, True, None)
    assert digests(source) == before
    assert {path.name for path in tmp_path.iterdir()} == {"source", "linked", "patched", "patch.safetensors"}


def test_a_cache_of_links_is_never_written_through(tmp_path: Path) -> None:
    real, patch = checkpoint(tmp_path / "blobs")
    before = digests(real)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in real.iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    with pytest.raises(UsageError, match="is a link into a cache"):
        rewrite(snapshot, patch, False, None)
    rewrite(snapshot, patch, False, tmp_path / "patched")
    assert digests(real) == before
    whole = [path for path in (tmp_path / "patched").rglob("*") if path.is_file()]
    assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in whole)
    rewrite(tmp_path / "patched", patch, True, tmp_path / "back")
    assert digests(tmp_path / "back") == before


def test_links_and_copies(tmp_path: Path) -> None:
    source, patch = checkpoint(tmp_path / "source")
    rewrite(source, patch, False, tmp_path / "linked")
    rewrite(source, patch, False, tmp_path / "copied", Writing(link=False))
    assert digests(tmp_path / "linked") == digests(tmp_path / "copied")
    assert (tmp_path / "copied" / "LICENSE").stat().st_nlink == 1
    assert (tmp_path / "copied" / "LICENSE").stat().st_mtime == (source / "LICENSE").stat().st_mtime
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(1 << 24)
        file.seek(1 << 20)
        file.write(b"x" * 5000)
    duplicate(sparse, tmp_path / "sparse copy", link=False)
    assert (tmp_path / "sparse copy").read_bytes() == sparse.read_bytes()
    assert (tmp_path / "sparse copy").stat().st_blocks <= sparse.stat().st_blocks


def test_mixed_dtypes_stay_tensor_by_tensor(tmp_path: Path) -> None:
    source, patch = checkpoint(tmp_path / "source")
    for path in source.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file({name: t.float() if "norm" in name else t for name, t in held.items()}, path, {"format": "pt"})
    before = digests(source)
    done = rewrite(source, patch, False, tmp_path / "patched")
    assert done.compared == "every weight"  # loaded in one dtype, the norms are what the patch was made with
    assert {str(t.dtype) for name, t in tensors(tmp_path / "patched").items() if "norm" in name} == {"torch.float32"}
    rewrite(tmp_path / "patched", patch, True, tmp_path / "back")
    assert digests(tmp_path / "back") == before


def test_another_model_is_refused(tmp_path: Path) -> None:
    source, patch = checkpoint(tmp_path / "source")
    done = rewrite(source, patch, False, tmp_path / "o")
    names = {layer: name for layer, (name,) in done.tensors.items()}
    layer, name = min(names.items())

    def changed(of: str, row: int, column: int) -> Path:
        folder = tmp_path / f"{of}-{row}"
        shutil.copytree(source, folder)
        path = next(file for file in folder.glob("*.safetensors") if of in safe_open(file, "pt").keys())  # noqa: SIM118
        with safe_open(path, "pt") as file:
            held = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        held[of][row, column] += 1
        save_file(held, path, {"format": "pt"})
        return folder

    columns = patch.changes[layer].columns.tolist()
    free = next(at for at in range(48) if at not in columns)
    for folder, message in (
        (changed(name, 3, columns[0]), "hold other values"),
        (changed(name, 4, free), rf"layers \[{layer}\] are not as they were"),
        (changed(names[2], 3, int(patch.changes[2].columns[0])), r"layers \[2\] are not as they were"),  # has a twin
        (changed("model.embed_tokens.weight", 0, 0), "the weights of this model are others"),
    ):
        with pytest.raises(WrongModelError, match=message):
            rewrite(folder, patch, False, tmp_path / "no")
        with pytest.raises(WrongModelError):
            patch.apply(load(folder))
    with pytest.raises(OtherDtypeError, match="in bfloat16, .* stores F32"):
        save_model(oracle_models.net("llama"), tmp_path / "float32")
        rewrite(tmp_path / "float32", patch, False, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_folders_that_cannot_be_are_refused_in_a_line(tmp_path: Path) -> None:
    source, patch = checkpoint(tmp_path / "source")
    shard = source / "model-00002-of-00003.safetensors"
    raw, index = shard.read_bytes(), source / "model.safetensors.index.json"

    def refused(
        message: str, kind: type[Exception] = ModelError, output: str = "no", how: Writing | None = None
    ) -> None:
        names = {path.name for path in tmp_path.iterdir()}
        before = digests(source)
        with pytest.raises(kind, match=message) as caught:
            rewrite(source, patch, False, tmp_path / output, how)
        assert "\n" not in str(caught.value)
        assert {path.name for path in tmp_path.iterdir()} == names
        assert digests(source) == before

    shard.unlink()
    refused("no such file, and model.safetensors.index.json names it")
    for damage in (raw[:-1], raw[:5], b"\xff" * 8 + raw[8:], raw[:8] + b"[" + raw[9:], b""):
        shard.write_bytes(damage)
        refused("damaged, or no safetensors file")
    shard.write_bytes(raw)
    text = index.read_text(encoding="utf-8")
    for damage in ("", "[]", "{}", '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": 3}'):
        index.write_text(damage, encoding="utf-8")
        refused("not an index")
    index.write_text(text.replace("v_head.bias", "v_head.other"), encoding="utf-8")
    refused("v_head.other is not in")
    index.unlink()
    refused("lacks its index")
    index.write_text(text, encoding="utf-8")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine", encoding="utf-8")
    refused("exists already", UsageError, "taken")
    refused("is the model that is read", UsageError, "source")
    refused("lies inside the model folder", UsageError, "source/inside")
    (source / "gone").symlink_to("nowhere")
    refused("leads nowhere")
    (source / "gone").unlink()
    rewrite(source, patch, False, tmp_path / "taken", Writing(force=True))
    assert digests(tmp_path / "taken").keys() == digests(source).keys()
    for path in source.glob("*.safetensors"):
        path.unlink()
    index.unlink()
    refused("no model.safetensors and no")
    (source / "pytorch_model.bin").write_bytes(b"")
    refused("convert them first")


@pytest.mark.parametrize("at", range(9))
def test_a_full_disk_leaves_all_as_it_was(tmp_path: Path, at: int) -> None:
    """At twelve limits on the size of files here; tests/hard/ tries three hundred."""
    writes = all_writes(tmp_path, oracle_models.net())[at]
    found = tried_full(writes, LOWEST + 4, random.Random(0))
    assert found["refused"] >= LOWEST, writes.name


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_killed_at_any_moment_the_folder_is_old_or_new(tmp_path: Path) -> None:
    """Ten kills here; tests/hard/ does a thousand."""
    source, patch = checkpoint(tmp_path / "source")
    old = digests(source)
    start = time.perf_counter()
    rewrite(source, patch, False, tmp_path / "new")
    span = time.perf_counter() - start
    new = digests(tmp_path / "new")
    for at in range(10):
        process = os.fork()
        if process == 0:
            torch.set_num_threads(1)
            for number in range(1000):
                rewrite(source, patch, bool(number % 2), None)
            os._exit(0)
        time.sleep(span * at / 4)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        found = digests(source)
        assert found in (old, new)
        if found == new:
            rewrite(source, patch, True, None)


def test_twins_are_told_apart_by_name_and_else_refused(tmp_path: Path) -> None:
    source, patch = checkpoint(tmp_path / "source")
    done: Rewritten = rewrite(source, patch, False, tmp_path / "o")
    assert not any(name.startswith("mtp") for name in done.names)
    assert replace(done, stale=()) == done
