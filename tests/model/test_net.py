"""A loaded model: views of its neurons, batches without influence, plain greedy text, careful loading."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import huggingface_hub
import oracle
import oracle_models
import pytest
import torch
from oracle_models import FAILURES, State

from lmrepair import ModelError, UsageError, diagnose, load
from lmrepair.model.loading.opening import _hub_is_out_of_reach
from lmrepair.model.net import Net, settled

EMBEDDED = Path(__file__).resolve().parents[2] / "lmrepair" / "model" / "embedded" / "model"


@pytest.fixture(scope="module", params=oracle_models.KINDS)
def net(request: pytest.FixtureRequest) -> Net:
    return oracle_models.net(request.param)


def test_columns_are_a_view_of_the_weights(net: Net) -> None:
    neurons = net.columns(1)
    assert neurons.shape == (oracle_models.WIDTH, oracle_models.HIDDEN)
    kept = neurons[3].clone()
    (batch,) = net.batches(net.tokenize(FAILURES[:1]))
    before = net.logits(batch)
    neurons[3] += 1
    assert not torch.equal(net.logits(batch), before)
    neurons[3] = kept
    assert torch.equal(net.logits(batch), before)


def test_logits_at_rows_are_those_of_a_plain_forward_pass(net: Net) -> None:
    tokens = net.tokenize(FAILURES)
    (batch,) = net.batches(tokens)
    wanted = [oracle.logits(net.model, t.ids)[len(t.prompt) - 1 : -1] for t in tokens]
    assert torch.allclose(net.logits(batch).double(), torch.cat(wanted), atol=1e-4)


def test_diagnosis_is_the_same_in_any_company(net: Net) -> None:
    alone = [diagnose(net, [failure])[0] for failure in FAILURES]
    for side in ("left", "right"):
        net.tokenizer.padding_side = side
        for at_once in (10_000, 40, 1):
            for order in (FAILURES, FAILURES[::-1]):
                found = {item.tokens.id: item for item in diagnose(net, order, at_once)}
                for wanted in alone:
                    here = found[wanted.tokens.id]
                    assert [(m.position, m.wanted, m.said) for m in here.mistakes] == [
                        (m.position, m.wanted, m.said) for m in wanted.mistakes
                    ]
                    gaps = [m.gap for m in here.mistakes]
                    assert gaps == pytest.approx([m.gap for m in wanted.mistakes], abs=1e-4)


def test_mistakes_are_those_of_one_pass_for_each_prefix(net: Net) -> None:
    for item in diagnose(net, FAILURES):
        wanted = oracle.mistakes(net.model, item.tokens.prompt, item.tokens.target)
        assert [(m.position, m.wanted, m.said) for m in item.mistakes] == [w[:3] for w in wanted]
        assert [m.gap for m in item.mistakes] == pytest.approx([w[3] for w in wanted], abs=1e-4)
        assert all(m.gap >= 0 for m in item.mistakes)


def test_a_tie_is_a_mistake(net: Net) -> None:
    from lmrepair.model.batches import Preference

    preference = Preference.of(torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0]]), torch.tensor([0, 1]))
    assert preference.gap.tolist() == [0.0, -1.0]
    assert preference.rival.tolist() == [1, 2]


def test_generate_is_plain_greedy_whatever_the_model_asks_for(net: Net) -> None:
    net.model.generation_config.repetition_penalty = 5.0
    net.model.generation_config.do_sample = True
    before = State.of(net)
    tokens = net.tokenize(FAILURES)
    for item, made in zip(tokens, net.generate(tokens), strict=True):
        wanted = oracle.greedy(net.model, item.prompt, len(item.target))
        if net.tokenizer.eos_token_id in wanted:
            wanted = wanted[: wanted.index(net.tokenizer.eos_token_id) + 1]
        assert list(made)[: len(wanted)] == wanted
    assert not before.changed(net)


@pytest.mark.parametrize("focus", [None, "some"])
@pytest.mark.parametrize("at_once", [10_000, 30])
def test_gradients_and_coefficients_agree_with_dense_autograd(net: Net, focus: str | None, at_once: int) -> None:
    tokens = net.tokenize(FAILURES)
    batches = net.batches(tokens, at_once)
    rows = sum(len(item.target) for item in tokens)
    chosen = None if focus is None else torch.arange(rows) % 3 == 1
    sites = net.every_site()
    with settled(net.model):
        reading = net.read(batches, sites, chosen)
    pairs = oracle_models.pairs(tokens)
    wanted = oracle.gradients(net.model, pairs, None if chosen is None else chosen.tolist())
    for layer in sites.layers:
        scale = float(wanted[layer].abs().max())
        assert torch.allclose(reading.gradients[layer].double(), wanted[layer], atol=1e-4 * scale)
        z = oracle.coefficients(net.model, layer, pairs)
        assert torch.allclose(reading.coefficients[layer].double(), z, atol=1e-4)


def test_settled_restores_modes_and_gradients() -> None:
    net = oracle_models.net()
    net.model.train().requires_grad_(True)
    before = State.of(net)
    with pytest.raises(RuntimeError), settled(net.model):
        assert not net.model.training
        raise RuntimeError
    assert not before.changed(net)


# --- load -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(EMBEDDED, tmp_path / "model")
    return tmp_path / "model"


def test_the_embedded_model_loads_in_every_dtype() -> None:
    for dtype in ("auto", "float32", "bfloat16", "float16"):
        net = load(dtype=dtype)
        assert str(net.dtype) == f"torch.{'float32' if dtype == 'auto' else dtype}"
        assert net.name == "embedded"


def test_what_cannot_be_loaded_is_refused(folder: Path, tmp_path: Path) -> None:
    for arguments, said in (
        ({"model": tmp_path / "none"}, "no such model folder"),
        ({"model": tmp_path}, "no config.json"),
        ({"model": folder, "dtype": "int8"}, "unknown dtype"),
        ({"model": folder, "device": "tpu9"}, "unknown device"),
        ({"model": folder, "device": "cuda:99"}, "is not here"),
        ({"model": folder, "device": "meta"}, "holds no weights"),
        ({"model": "nobody/nothing"}, "nobody/nothing"),
    ):
        with pytest.raises((ModelError, UsageError), match=said):
            load(**arguments)  # type: ignore[arg-type]


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        assert not _hub_is_out_of_reach()
    assert _hub_is_out_of_reach()
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert not _hub_is_out_of_reach()


def test_a_checkpoint_that_lacks_weights_is_refused(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"missing keys .*layers\.2\.mlp\.down_proj"):
        load(folder)


def test_a_damaged_or_pickled_checkpoint_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folder)
    path.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folder)


def test_a_quantised_checkpoint_is_refused_before_loading(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="quantised"):
        load(folder)
