"""Patches: bit for bit there and back, and refused where anything is not as it must be."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import oracle_models
import pytest
import safetensors.torch
import torch
from factored import made_up
from hypothesis import given, settings, strategies as st
from oracle_models import FAILURES, State, bold_star, same_bits, tensors
from torch import Tensor

from lmrepair import ModelError, Net, Patch, PatchError, Reference, UsageError, WrongModelError, load, repair
from lmrepair.failures import umask
from lmrepair.failures.files import write_atomically
from lmrepair.model import LowRank, Product, fingerprint
from lmrepair.model.anatomy.stacks import Place
from lmrepair.model.edit import Trial
from lmrepair.model.edit.sparse_integers import pack
from lmrepair.patch import save_model
from lmrepair.patch.format import KEY, _stamp

TEXT = Reference("test", ("for i in range(10):\n    print(i)\n", "the quick brown fox"))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def made_on(net: Net, share: str = "1/4", count: int = 2) -> Patch:
    """A patch for the first failures, taken back again."""
    result = repair(net, FAILURES[:count], bold_star(share=share, learning_rate=0.1, epochs=200, margin=0.1), TEXT)
    assert result.patch is not None
    result.patch.revert(net)
    return result.patch


@cache
def small() -> bytes:
    """The bytes of a small patch for the tiny Llama."""
    return made_on(oracle_models.net(), "1/16", 1).serialise()


@pytest.mark.parametrize("kind", oracle_models.KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back_is_bit_for_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    net = oracle_models.net(kind, dtype=dtype)
    before = State.of(net)
    patch = made_on(net)
    assert not before.changed(net)
    patch.save(tmp_path / "p.safetensors")
    loaded = Patch.load(tmp_path / "p.safetensors")
    assert loaded.serialise() == patch.serialise() == (tmp_path / "p.safetensors").read_bytes()
    assert loaded.items == patch.items
    assert loaded.size == (tmp_path / "p.safetensors").stat().st_size
    loaded.apply(net)
    assert before.changed(net) == [f"{net.anatomy.names[layer]}.weight" for layer in sorted(loaded.changes)]
    with pytest.raises(WrongModelError, match="already applied"):
        loaded.apply(net)
    loaded.revert(net)
    assert not before.changed(net)
    with pytest.raises(WrongModelError, match="not applied"):
        loaded.revert(net)


def test_a_patch_that_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    patch = made_on(oracle_models.net(dtype=torch.float64))
    with pytest.raises(PatchError, match="holds float32, bfloat16, float16; this patch is of float64"):
        patch.save(tmp_path / "p.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", oracle_models.KINDS)
def test_only_the_chosen_columns_change(kind: str) -> None:
    net = oracle_models.net(kind)
    before = [net.columns(layer).clone() for layer in range(net.layers)]
    patch = made_up(net, FAILURES, share=16)
    patch.apply(net)
    for layer in range(net.layers):
        changed = set(patch.changes[layer].columns.tolist()) if layer in patch.changes else set()
        assert len(changed) <= 3
        for neuron in range(oracle_models.WIDTH):
            moved = not same_bits(net.columns(layer)[neuron], before[layer][neuron])
            assert moved == (neuron in changed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saved_folder_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    for kind in oracle_models.KINDS:
        start = tmp_path / kind
        save_model(oracle_models.net(kind, dtype=dtype), start / "0")
        net = load(start / "0")
        assert net.dtype == dtype
        patch = made_up(net, FAILURES)
        patch.apply(net)
        save_model(net, start / "1")
        patched = load(start / "1")
        patch.revert(patched)
        save_model(patched, start / "2")
        first, middle, last = (tensors(start / name) for name in "012")
        assert first.keys() == last.keys()
        assert all(same_bits(first[key], last[key]) for key in first)
        assert not all(same_bits(first[key], middle[key]) for key in first)


def test_a_model_is_saved_whole_or_not_at_all_and_over_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, place = oracle_models.net(), tmp_path / "deep" / "model"
    (place / "mine").mkdir(parents=True)
    with pytest.raises(UsageError, match="model exists already; expected a folder that is not there yet"):
        save_model(net, place)
    assert [path.name for path in place.parent.iterdir()] == ["model"]
    assert [path.name for path in place.iterdir()] == ["mine"]
    (place / "mine").rmdir()
    with monkeypatch.context() as broken:
        broken.setattr(net.tokenizer, "save_pretrained", lambda _: net.columns(0).zero_())
        with torch.no_grad(), pytest.raises(ModelError, match="was not saved as it is in memory; nothing was written"):
            save_model(net, place)
    assert not list(place.iterdir())
    assert [path.name for path in place.parent.iterdir()] == ["model"]
    save_model(net, place)
    assert {path.stat().st_mode & 0o777 for path in place.iterdir()} == {0o666 & ~umask()}
    assert place.stat().st_mode & 0o777 == 0o777 & ~umask()


# --- factors --------------------------------------------------------------------------------------


def factored(net: Net, layers: tuple[int, ...] = (0, 2), size: float = 0.02) -> Patch:
    """A patch that changes whole layers by products of rank 2; what it is for comes from another one."""
    generator = torch.Generator().manual_seed(0)
    deltas = {
        layer: Product.of(
            size * torch.randn(2, oracle_models.WIDTH, generator=generator),
            torch.randn(2, oracle_models.HIDDEN, generator=generator),
        )
        for layer in layers
    }
    with Trial(net, net.every_site()) as trial:
        changes = trial.changes(deltas)
    given = read_contents_of(small())
    return Patch(changes, given.items, given.made, fingerprint(net, {}))


def read_contents_of(raw: bytes) -> Patch:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p"
        path.write_bytes(raw)
        return Patch.load(path)


@pytest.mark.parametrize("kind", oracle_models.KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_there_and_back_is_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    net = oracle_models.net(kind, dtype=dtype)
    before = State.of(net)
    patch = factored(net)
    assert not before.changed(net)
    loaded = read_contents_of(patch.serialise())
    assert loaded.serialise() == patch.serialise()
    assert loaded.dtype == dtype
    assert not loaded.is_applied(net)
    weights = {layer: net.columns(layer).double() for layer in patch.changes}
    with loaded.on(net):
        assert before.changed(net)
        inside = {layer: net.columns(layer).clone() for layer in patch.changes}
    assert not before.changed(net)
    loaded.apply(net)
    assert before.changed(net) == [f"{net.anatomy.names[layer]}.weight" for layer in sorted(patch.changes)]
    for layer, (a, b) in loaded.factors(net.widths).items():
        assert same_bits(net.columns(layer), inside[layer])
        change = (b.double() @ a.double()).T
        assert torch.equal(change, loaded.changes[layer].delta.dense())
        assert same_bits(net.columns(layer), (weights[layer] + change).float().to(dtype))
    assert loaded.is_applied(net)
    assert not loaded.is_original(net)
    with pytest.raises(WrongModelError, match="already applied"):
        loaded.apply(net)
    with pytest.raises(WrongModelError, match="original values"), loaded.on(net):
        pass
    loaded.revert(net)
    assert not before.changed(net)
    assert loaded.is_original(net)
    with pytest.raises(WrongModelError, match="not applied"):
        loaded.revert(net)


@pytest.mark.parametrize("applied", [False, True])
def test_factors_are_refused_for_any_other_weights(applied: bool) -> None:
    """One bit in a changed layer, in another one, or in the body; and another patch on top."""
    net = oracle_models.net()
    patch = factored(net)
    if applied:
        patch.apply(net)
    for name in (f"{net.anatomy.names[0]}.weight", f"{net.anatomy.names[1]}.weight", "model.norm.weight"):
        bits = net.model.get_parameter(name).view(torch.int32).flatten()
        bits[-1] ^= 1
        before = State.of(net)
        for act in (patch.apply, patch.revert, patch.is_applied):
            with pytest.raises(WrongModelError):
                act(net)
        assert not before.changed(net)
        bits[-1] ^= 1
    if applied:
        top = factored(net, (2,), 0.01)
        top.apply(net)
        with pytest.raises(WrongModelError, match="reverse order"):
            patch.revert(net)
        top.revert(net)
        patch.revert(net)
    for other in (oracle_models.net("gpt2"), oracle_models.net(dtype=torch.bfloat16), oracle_models.net(seed=1)):
        for act in (patch.apply, patch.revert, patch.is_applied):
            with pytest.raises(WrongModelError):
                act(other)


FORGED_FACTORS: dict[str, Callable[[dict[str, Tensor], dict[str, object]], object]] = {
    "old format": lambda p, r: r.update({"format": 1}),
    "no dtype": lambda p, r: r["model"].pop("dtype"),  # type: ignore[attr-defined]
    "unknown dtype": lambda p, r: r["model"].update({"dtype": "int8"}),  # type: ignore[attr-defined]
    "left as floats": lambda p, r: p.update({"layers.0.left": p["layers.0.left"].float()}),
    "left as one row": lambda p, r: p.update({"layers.0.left": p["layers.0.left"][0].clone()}),
    "one direction less": lambda p, r: p.update({"layers.0.right": p["layers.0.right"][1:].clone()}),
    "no direction": lambda p, r: p.update({f"layers.0.{n}": p[f"layers.0.{n}"][:0].clone() for n in FACTORS}),
    "exponents too large": lambda p, r: p["layers.0.exponents"].fill_(2000),
    "exponents far apart": lambda p, r: p["layers.0.exponents"].copy_(torch.tensor([-50, 0])),
    "another width": lambda p, r: p.update({"layers.0.right": p["layers.0.right"][:, 1:].clone()}),
    "columns beside factors": lambda p, r: p.update({"layers.0.columns": torch.zeros(1, dtype=torch.int64)}),
    "missing residue": lambda p, r: p.pop("layers.0.residue"),
    "empty residue": lambda p, r: p.update({"layers.0.residue": torch.zeros(0, dtype=torch.uint8)}),
    "residue cut off": lambda p, r: p.update({"layers.0.residue": p["layers.0.residue"][:-1].clone()}),
    "residue and more": lambda p, r: p.update({"layers.0.residue": p["layers.0.residue"].repeat(2)}),
    "residue of many": lambda p, r: p["layers.0.residue"][:8].fill_(255),
    "residue beyond the layer": lambda p, r: p.update({"layers.0.residue": beyond()}),
}
FACTORS = ("left", "right", "exponents")


def beyond() -> Tensor:
    place = np.array([oracle_models.WIDTH * oracle_models.HIDDEN])
    return torch.frombuffer(bytearray(pack(place, np.array([1]))), dtype=torch.uint8)


@pytest.mark.parametrize("name", FORGED_FACTORS)
def test_factors_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    said = refused(remade(FORGED_FACTORS[name], factored(oracle_models.net()).serialise()), tmp_path)
    assert "not a patch this version can read" in said


def test_a_residue_that_is_not_this_models_is_no_way_back() -> None:
    net = oracle_models.net()
    patch = factored(net)
    change = patch.changes[0]
    assert isinstance(change, LowRank)
    empty = torch.frombuffer(bytearray(pack(np.zeros(0, np.int64), np.zeros(0, np.int64))), dtype=torch.uint8)
    wrong = replace(patch, changes={**patch.changes, 0: replace(change, residue=empty)})
    patch.apply(net)
    before = State.of(net)
    with pytest.raises(WrongModelError):
        wrong.revert(net)
    assert not before.changed(net)


def test_patches_of_single_neurons_are_written_as_before() -> None:
    raw = small()
    record = json.loads(json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])["__metadata__"][KEY])
    assert record["format"] == 1
    assert "dtype" not in record["model"]
    patch = read_contents_of(raw)
    for layer, (a, b) in patch.factors((oracle_models.WIDTH,) * oracle_models.LAYERS).items():
        change = patch.changes[layer]
        whole = torch.zeros(oracle_models.WIDTH, oracle_models.HIDDEN)
        whole[change.columns] = change.deltas
        assert torch.equal(b @ a, whole.T)


def test_the_same_repair_gives_the_same_bytes() -> None:
    assert made_on(oracle_models.net(), "1/16", 1).serialise() == small()


# --- damage ---------------------------------------------------------------------------------------


def refused(raw: bytes, folder: Path) -> str:
    path = folder / "damaged.safetensors"
    path.write_bytes(raw)
    with pytest.raises(PatchError) as caught:
        Patch.load(path)
    return str(caught.value)


def test_every_flipped_byte_of_the_header_is_refused(tmp_path: Path) -> None:
    raw = small()
    for at in range(8 + struct.unpack("<Q", raw[:8])[0]):
        refused(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :], tmp_path)


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_any_flip_cut_or_addition_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    raw, folder = small(), tmp_path_factory.getbasetemp()
    at = data.draw(st.integers(0, len(raw) - 1))
    flipped = bytes([raw[at] ^ data.draw(st.integers(1, 255))])
    refused(raw[:at] + flipped + raw[at + 1 :], folder)
    refused(raw[:at], folder)
    refused(raw + flipped, folder)


def remade(change: Callable[[dict[str, Tensor], dict[str, object]], object], given: bytes | None = None) -> bytes:
    """A patch (the small one) with other content and a digest that fits it."""
    raw = given or small()
    length = struct.unpack("<Q", raw[:8])[0]
    record = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"][KEY])
    record["digest"] = "0" * 64
    parts = safetensors.torch.load(raw)
    change(parts, record)
    return _stamp(safetensors.torch.save(parts, {KEY: json.dumps(record, sort_keys=True, separators=(",", ":"))}))


def first(parts: dict[str, Tensor], end: str) -> str:
    return next(name for name in sorted(parts) if name.endswith(end))


FORGED: dict[str, Callable[[dict[str, Tensor], dict[str, object]], object]] = {
    "NaN": lambda p, r: p[first(p, "deltas")].fill_(float("nan")),
    "infinite": lambda p, r: p[first(p, "deltas")].fill_(float("inf")),
    "unsorted": lambda p, r: p.update({first(p, "columns"): p[first(p, "columns")].flip(0)}),
    "twice": lambda p, r: p[first(p, "columns")].fill_(3),
    "negative": lambda p, r: p[first(p, "columns")].sub_(1000),
    "columns as floats": lambda p, r: p.update({first(p, "columns"): p[first(p, "columns")].float()}),
    "deltas in half": lambda p, r: p.update({first(p, "deltas"): p[first(p, "deltas")].half()}),
    "too few deltas": lambda p, r: p.update({first(p, "deltas"): p[first(p, "deltas")][1:].clone()}),
    "missing tensor": lambda p, r: p.pop(first(p, "originals")),
    "extra tensor": lambda p, r: p.update({"layers.0.more": torch.zeros(1)}),
    "layer out of range": lambda p, r: p.update({"layers.99.columns": torch.zeros(1, dtype=torch.int64)}),
    "format": lambda p, r: r.update({"format": 3}),
    "format of factors": lambda p, r: r.update({"format": 2}),
    "no failures": lambda p, r: r.update({"failures": []}),
    "failures of a wrong type": lambda p, r: r.update({"failures": [1]}),
    "ids of a wrong type": lambda p, r: r["failures"][0].update({"target_ids": ["1"]}),  # type: ignore[index]
    "model of a wrong type": lambda p, r: r.update({"model": "m"}),
    "missing key": lambda p, r: r.pop("drift"),
    "neurons of no width": lambda p, r: p.update(
        {name: p[name][:, :0].clone() for name in p if not name.endswith("columns")}
    ),
    "drift that is NaN": lambda p, r: r.update({"drift": {"kl": float("nan")}}),
    "a gap beyond floats": lambda p, r: r["failures"][0].update({"before": [[0, 1, 2, 10**400]]}),  # type: ignore[index]
    "a position beyond numbers": lambda p, r: r["failures"][0].update({"after": [[float("inf"), 1, 2, 0.5]]}),  # type: ignore[index]
}


@pytest.mark.parametrize("name", FORGED)
def test_a_sound_digest_over_bad_content_is_refused(name: str, tmp_path: Path) -> None:
    assert "not a patch this version can read" in refused(remade(FORGED[name]), tmp_path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    assert "no digest" in refused(b"", tmp_path)
    assert "no digest" in refused(safetensors.torch.save({"a": torch.zeros(2)}), tmp_path)
    assert "no digest" in refused(struct.pack("<Q", 2**62) + b"{}", tmp_path)
    with pytest.raises(PatchError, match="no such file"):
        Patch.load(tmp_path / "none")
    with pytest.raises(PatchError, match="cannot be read"):
        Patch.load(tmp_path)


def test_one_failure_that_a_patch_does_not_move_stands_against_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that are not chosen for it, or neurons that are silent there: another failure is looked at."""
    net = oracle_models.net()
    patch = made_on(net)
    assert len(patch.items) > 1
    still: set[str] = {patch.items[0].tokens.id}
    real = Net.logits
    monkeypatch.setattr(
        Net,
        "logits",
        lambda self, batch, *more: real(self, batch, *more) * (batch.tokens[0].id not in still),
    )
    patch.apply(net)
    assert patch.is_applied(net)
    patch.revert(net)
    before = State.of(net)
    still |= {item.tokens.id for item in patch.items}
    with pytest.raises(PatchError, match="did not move"):
        patch.apply(net)
    assert not before.changed(net)


def test_a_failure_of_tokens_that_the_model_does_not_have_is_refused() -> None:
    net = oracle_models.net()
    patch = made_on(net)
    tokens = replace(patch.items[0].tokens, target=(net.anatomy.vocabulary,))
    other = replace(patch, items=(replace(patch.items[0], tokens=tokens), *patch.items[1:]))
    with pytest.raises(WrongModelError, match="vocabulary"):
        other.apply(net)


# --- other models ---------------------------------------------------------------------------------


def test_a_patch_for_another_model_is_refused_before_any_weight_is_touched() -> None:
    net = oracle_models.net()
    patch = made_on(net)
    others = [
        oracle_models.net("gpt2"),
        oracle_models.net(seed=1),
        oracle_models.net(dtype=torch.bfloat16),
    ]
    for name, parameter in net.model.named_parameters():
        other = oracle_models.net()
        bits = other.model.get_parameter(name).view(torch.int32).flatten()
        if name == f"{net.anatomy.names[0]}.weight":
            bits = other.columns(0)[patch.changes[0].columns[0]].view(torch.int32)
        bits[-1] ^= 1
        assert not torch.equal(other.model.get_parameter(name), parameter)
        others.append(other)
    for other in others:
        before = State.of(other)
        with pytest.raises(WrongModelError):
            patch.apply(other)
        with pytest.raises(WrongModelError):
            patch.revert(other)
        assert not before.changed(other)
    wide = max(patch.changes)
    columns = torch.tensor([*patch.changes[wide].columns.tolist()[:-1], 10_000])
    beyond = replace(patch, changes={**patch.changes, wide: replace(patch.changes[wide], columns=columns)})
    with pytest.raises(WrongModelError, match="wider layers"):
        beyond.apply(net)


def test_patches_come_off_in_reverse_order_only() -> None:
    net = oracle_models.net()
    before = State.of(net)
    one = repair(net, FAILURES[:1], bold_star(learning_rate=0.1), TEXT).patch
    two = repair(net, FAILURES[3:], bold_star(learning_rate=0.1), TEXT).patch
    assert one is not None
    assert two is not None
    between = State.of(net)
    with pytest.raises(WrongModelError):
        one.revert(net)
    assert not between.changed(net)
    two.revert(net)
    one.revert(net)
    assert not before.changed(net)


def test_an_apply_that_changes_nothing_is_an_error() -> None:
    net = oracle_models.net(dtype=torch.bfloat16)
    patch = made_on(net)
    tiny = {layer: replace(c, deltas=c.deltas.sign() * 1e-9) for layer, c in patch.changes.items()}
    before = State.of(net)
    with pytest.raises(PatchError, match="did not move"):
        replace(patch, changes=tiny).apply(net)
    assert not before.changed(net)


# --- whatever happens in between ------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_a_trial_puts_everything_back(error: type[BaseException]) -> None:
    net = oracle_models.net()
    patch = made_on(net)
    before = State.of(net)
    with pytest.raises(error), patch.on(net):
        assert before.changed(net)
        raise error
    assert not before.changed(net)
    with pytest.raises(error), Trial(net, net.every_site()) as trial:
        trial.write({0: torch.ones(oracle_models.WIDTH, oracle_models.HIDDEN)})
        trial.keep()
        raise error
    assert not before.changed(net)


def test_a_ctrl_c_while_weights_are_put_back_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # which background jobs ignore
    net = oracle_models.net()
    before = State.of(net)
    kept = Place.put

    def interrupted(place: Place, columns: Tensor, values: Tensor) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        kept(place, columns, values)

    with pytest.raises(KeyboardInterrupt), Trial(net, net.every_site()) as trial:
        trial.write({0: torch.ones(oracle_models.WIDTH, oracle_models.HIDDEN)})
        monkeypatch.setattr(Place, "put", interrupted)
    monkeypatch.undo()
    assert not before.changed(net)
    assert signal.signal(signal.SIGINT, outside) is signal.default_int_handler


def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    one, two = small(), remade(lambda p, r: r.update({"drift": {"note": "x" * 50_000}}))
    (tmp_path / "two").write_bytes(two)
    (tmp_path / "one").write_bytes(one)
    script = (
        "import sys; from pathlib import Path; from lmrepair.failures import write_atomically as w\n"
        "a, b, p = (Path(x) for x in sys.argv[1:]); A, B = a.read_bytes(), b.read_bytes(); print('up', flush=True)\n"
        "while True: w(p, A); w(p, B)"
    )
    sound = {hashlib.sha256(raw).digest() for raw in (one, two)}
    for attempt in range(4):
        arguments = [sys.executable, "-c", script, str(tmp_path / "one"), str(tmp_path / "two"), str(path)]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.05 + 0.013 * attempt)
        process.kill()
        process.wait()
        assert hashlib.sha256(path.read_bytes()).digest() in sound
        Patch.load(path)


def test_a_saved_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_atomically(tmp_path / "deep" / "p", b"x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "deep" / "p").stat().st_mode) == 0o640
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["p"]
