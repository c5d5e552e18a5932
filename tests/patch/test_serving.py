"""Adapters against the engines that read them: PEFT to 1e-5 in the logits, llama.cpp token by token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import oracle_models
import pytest
import torch
from factored import answering, factored, made_up
from oracle_models import FAILURES, LAYERS, WIDTH, State
from tiny_gguf import tiny_gguf

from lmrepair import Net, Patch, PatchError, UsageError, WrongModelError
from lmrepair.model import fingerprint
from lmrepair.patch import (
    Factors,
    Held,
    Modules,
    answers,
    best_of_tried,
    chosen,
    exact,
    held,
    held_by_llama_cpp,
    held_over,
    held_whole,
    holding,
    known_architecture,
    llama_cpp,
    llama_tokens,
    peft_on,
    read_base,
    save_gguf,
    save_peft,
    until_held,
)

WIDTHS = dict.fromkeys(range(LAYERS), WIDTH)
gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'lmrepair[gguf]'")


@cache
def made(kind: str, how: str) -> bytes:
    """A made-up patch of neurons or of factors in two layers of three, and what the model writes with it."""
    net = oracle_models.net(kind)
    patch = made_up(net, FAILURES)
    patch = replace(patch, changes={layer: patch.changes[layer] for layer in (0, 2)})
    columns = {layer: change.columns for layer, change in patch.changes.items()}
    patch = replace(patch, fingerprint=fingerprint(net, columns))
    patch = answering(net, factored(net, patch) if how == "factors" else patch)
    assert any(item.repaired for item in patch.items)
    return patch.serialise()


@pytest.fixture(
    params=[("llama", "neurons"), ("llama", "factors"), ("gpt2", "factors")], ids=lambda param: "-".join(param)
)
def patched(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Net, Patch]]:
    """A net without its patch, and the patch."""
    kind, method = request.param
    path = tmp_path / "p.safetensors"
    path.write_bytes(made(kind, method))
    net = oracle_models.net(kind)
    before = State.of(net)
    yield net, Patch.load(path)
    assert not before.changed(net)


def logits(net: Net, patch: Patch) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([net.logits(batch) for batch in net.batches([item.tokens for item in patch.items])])


def change(factors: Factors, layer: int) -> torch.Tensor:
    a, b = (part.double() for part in factors.layers[layer])
    return b @ a


def test_factors_are_the_patch(patched: tuple[Net, Patch]) -> None:
    net, patch = patched
    factors = exact(patch, WIDTHS)
    for layer, part in patch.changes.items():
        dense = torch.zeros(net.hidden, WIDTH, dtype=torch.float64)
        dense[:, part.columns] = part.deltas.double().T
        assert (change(factors, layer) - dense).abs().max() <= 2e-6 * dense.abs().max()
        assert factors.ranks[layer] <= torch.linalg.matrix_rank(dense, rtol=1e-9)
        for rank in (1, 3):
            left, values, right = torch.linalg.svd(dense)
            nearest = left[:, :rank] * values[:rank] @ right[:rank]
            assert (change(factors.cut(rank), layer) - nearest).norm() <= 1e-5 * dense.norm()
    assert {len(a) for a, _ in factors.padded(40).layers.values()} == {40}
    assert torch.equal(change(factors.padded(40), layer), change(factors, layer))
    assert factors.served().rank in (1, 8, 16, 32, 64)
    with pytest.raises(UsageError, match="too small"):
        factors.padded(factors.rank - 1)
    with pytest.raises(PatchError, match="the model has none such"):
        exact(patch, dict.fromkeys(range(LAYERS), 3))


def test_peft_gives_the_patched_models_logits_and_texts(patched: tuple[Net, Patch], tmp_path: Path) -> None:
    net, patch = patched
    pytest.importorskip("peft", reason="needs PEFT: pip install 'lmrepair[lora]'")
    with patch.on(net):
        wanted = logits(net, patch)
    for name, factors in (("own", exact(patch, WIDTHS)), ("padded", exact(patch, WIDTHS).served())):
        config = save_peft(factors, Modules.of(net), tmp_path / name)
        assert config["fan_in_fan_out"] == (net.name == "tiny-gpt2")
        with peft_on(net, tmp_path / name):
            assert (logits(net, patch) - wanted).abs().max() < 1e-5
            found = holding(patch, 0, *answers(net, patch))
        assert not found.lost
        assert found.claimed > 0
    assert (logits(net, patch) - wanted).abs().max() > 1e-2  # the adapter is gone, and it did something
    with pytest.raises(UsageError, match="exists already"):
        save_peft(factors, Modules.of(net), tmp_path / name)
    save_peft(factors, Modules.of(net), tmp_path / name, force=True)
    assert sorted(path.name for path in (tmp_path / name).iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_cut_patch_holds_what_it_says(patched: tuple[Net, Patch]) -> None:
    net, patch = patched
    whole = exact(patch, WIDTHS)
    assert not held_whole(net, patch).lost
    assert not held(net, patch, whole).lost
    found = chosen(patch, WIDTHS, net, "least")
    assert found.factors.rank <= whole.rank == found.whole
    assert not held(net, patch, found.factors).lost
    below = [one for one in found.tried if one.rank == found.factors.rank - 1]
    assert found.factors.rank == 1 or below[0].lost
    assert chosen(patch, WIDTHS, None, "exact").tried == ()
    assert chosen(patch, WIDTHS, net, "1").factors.rank == 1
    with pytest.raises(UsageError, match="expected exact, least or"):
        chosen(patch, WIDTHS, net, "0")
    if whole.rank > 8:  # a quarter of the hidden width
        with pytest.raises(UsageError, match="name the float model"):
            chosen(patch, WIDTHS, None, None)
        assert chosen(patch, WIDTHS, net, None).tried


def test_the_gguf_says_what_llama_cpp_reads(patched: tuple[Net, Patch], tmp_path: Path) -> None:
    _, patch = patched
    factors = exact(patch, WIDTHS)
    path = tmp_path / "a.gguf"
    save_gguf(factors, "llama", path)
    reader = gguf.GGUFReader(path)
    said = {name: reader.fields[name].contents() for name in ("general.type", "general.architecture", "adapter.type")}
    assert said == {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()).double() for tensor in reader.tensors}
    assert len(tensors) == 2 * len(patch.changes)
    for layer in patch.changes:
        a, b = (tensors[f"blk.{layer}.ffn_down.weight.lora_{part}"] for part in "ab")
        assert (alpha / len(a) * b @ a - change(factors, layer)).abs().max() < 1e-6  # as llama.cpp scales it
    with pytest.raises(UsageError, match="exists already"):
        save_gguf(factors, "llama", path)
    assert [one.name for one in tmp_path.iterdir() if one.suffix == ".gguf"] == ["a.gguf"]


def test_names_and_bases_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no architecture 'lama' .did you mean 'llama'"):
        known_architecture("lama")
    patch = Patch.load(_write(tmp_path / "p", made("llama", "neurons")))
    other = Patch.load(_write(tmp_path / "q", made("llama", "factors")))
    base = tiny_gguf(oracle_models.net("llama"), tmp_path / "base.gguf")
    assert read_base(base, patch).architecture == "llama"
    assert read_base(base, other).widths == dict.fromkeys(other.changes, WIDTH)
    with pytest.raises(WrongModelError, match="not, in any quantisation"):
        read_base(tiny_gguf(oracle_models.net("llama", seed=1), tmp_path / "other.gguf"), patch)
    (tmp_path / "no.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(Exception, match="not a sound GGUF file"):
        read_base(tmp_path / "no.gguf", patch)


@pytest.mark.parametrize("stored", ["F32", "Q8_0"])
def test_llama_cpp_writes_the_repaired_answers(stored: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install 'lmrepair[engines]'")
    net = oracle_models.net("llama")
    patch = Patch.load(_write(tmp_path / "p", made("llama", "factors")))
    base = tiny_gguf(net, tmp_path / "base.gguf", stored)
    tokens = [item.tokens for item in patch.items]
    if stored == "F32":  # the stand-in itself is right: llama.cpp writes what transformers writes
        assert llama_cpp(base, None, tokens) == net.generate(tokens)
    save_gguf(exact(patch, WIDTHS), read_base(base, patch).architecture, tmp_path / "a.gguf")
    before = held_by_llama_cpp(patch, base, None)
    after = held_by_llama_cpp(patch, base, tmp_path / "a.gguf")
    assert before.kept < after.kept
    assert stored != "F32" or not after.lost  # what is made up has no margin that 8 bits would leave whole
    assert replace(after, rank=exact(patch, WIDTHS).rank) == held_over(base, patch, None, "exact")
    if stored == "F32":  # but for keys and values, which llama.cpp keeps in 16 bits
        with patch.on(net), torch.inference_mode():
            (batch,) = net.batches(tokens[:1])
            ours = net.logits(batch).float().log_softmax(dim=1)[0]
        for adapter, near in ((tmp_path / "a.gguf", True), (None, False)):
            ((token, value), *_), *_ = llama_tokens(base, adapter, tokens)
            assert (abs(float(ours[token]) - value) < 0.05) == near


def test_margins_are_doubled_until_all_holds_or_the_bound() -> None:
    patch = made_up(oracle_models.net(), FAILURES[:1])

    def tried(kept: dict[float, int], margin: float, most: float) -> tuple[list[float], float]:
        found = until_held(
            lambda asked: patch if asked in kept else None,
            lambda _: next(looks),
            margin,
            most,
        )
        return [one.margin for one in found], best_of_tried(found).margin

    for kept, margin, most, margins, best in (
        ({3.0: 2}, 3.0, 24.0, [3.0], 3.0),  # all hold at once
        ({3.0: 0, 6.0: 1, 12.0: 2}, 3.0, 24.0, [3.0, 6.0, 12.0], 12.0),
        ({3.0: 0, 6.0: 1, 12.0: 1, 24.0: 1}, 3.0, 24.0, [3.0, 6.0, 12.0, 24.0], 6.0),  # the least of the best
        ({3.0: 1, 6.0: 0, 12.0: 2}, 3.0, 11.0, [3.0, 6.0], 3.0),  # no further than the bound
        ({3.0: 1}, 3.0, 24.0, [3.0], 3.0),  # nothing is repaired with twice the margin
        ({0.0: 1, 1.0: 1, 2.0: 2}, 0.0, 24.0, [0.0, 1.0, 2.0], 2.0),
    ):
        looks = iter([Held(1, count, 2, ("a", "b")[count:]) for count in kept.values()])
        assert tried(kept, margin, most) == (margins, best)
    assert until_held(lambda _: None, lambda _: next(looks), 3.0) == ()


def _write(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path
