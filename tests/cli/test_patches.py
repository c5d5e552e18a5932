"""The commands that take patches into folders, to servers, together and apart; and how they say no."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

import oracle_models
import pytest
from command import Run, write
from oracle_models import FAILURES, bold_star
from tiny_gguf import tiny_gguf

from lmrepair import ModelError, Patch, Reference, repair
from lmrepair.patch import save_model

TEXT = Reference("test", ("for i in range(10):\n    print(i)\n", "the quick brown fox"))


@cache
def patches() -> tuple[bytes, ...]:
    net = oracle_models.net()
    found = []
    for failure in FAILURES[:2]:
        result = repair(net, [failure], bold_star(share="1/4", learning_rate=0.1, epochs=200, margin=0.1), TEXT)
        assert result.patch is not None
        result.patch.revert(net)
        found.append(result.patch.serialise())
    return tuple(found)


@pytest.fixture
def place(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and two patches for it, a.safetensors and b.safetensors; the commands run in it."""
    monkeypatch.chdir(tmp_path)
    save_model(oracle_models.net(), Path("model"))
    for name, raw in zip("ab", patches(), strict=True):
        Path(f"{name}.safetensors").write_bytes(raw)
    return tmp_path


def test_into_a_folder_and_out_again(run: Run, place: Path) -> None:
    before = {path.name: path.read_bytes() for path in Path("model").iterdir()}
    code, out, err = run("apply", "a.safetensors", "--model", "model", "--output", "patched", "--json")
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert data["compared"] == "every weight"
    assert data["files"] == ["model.safetensors"]
    code, out, _ = run("revert", "a.safetensors", "--model", "patched", "--in-place")
    assert (code, out.splitlines()[0][:10]) == (0, "taken back")
    assert {path.name: path.read_bytes() for path in Path("patched").iterdir()} == before
    code, out, _ = run("export", "a.safetensors", "--model", "model", "--to", "merged", "merged")
    assert (code, out.splitlines()[0][:7]) == (0, "applied")
    code, out, _ = run("apply", "a.safetensors", "--model", "model", "--output", "wide", "--dtype", "bfloat16")
    assert code == 2


def test_to_servers(run: Run, place: Path) -> None:
    pytest.importorskip("gguf", reason="needs gguf: pip install 'lmrepair[gguf]'")
    code, out, err = run("export", "a.safetensors", "--model", "model", "--to", "gguf", "a.gguf", "--json")
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert (data["architecture"], data["bytes"]) == ("llama", Path("a.gguf").stat().st_size)
    code, out, _ = run(
        "export", "a.safetensors", "--model", "model", "--to", "peft", "lora", "--vllm", "--rank", "exact"
    )
    assert code == 0
    assert json.loads(Path("lora/adapter_config.json").read_text(encoding="utf-8"))["r"] in (8, 16, 32, 64)
    pytest.importorskip("peft", reason="needs PEFT: pip install 'lmrepair[lora]'")
    flags = ["--engine", "peft", "--model", "model", "--adapter", "lora"]
    code, out, _ = run("verify", "a.safetensors", *flags, "--json")
    found = json.loads(out)
    assert (code, found["verified"], found["before"], found["repaired"]) == (0, True, 0, 1)


BOLD = "--method star --share 1/4 --learning-rate 0.1 --epochs 200 --max-probe-kl inf --max-kl inf --margin"


def test_a_repair_holds_where_it_is_served(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="needs gguf: pip install 'lmrepair[gguf]'")
    pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install 'lmrepair[engines]'")
    base = tiny_gguf(oracle_models.net("llama"), Path("base.gguf"), "Q8_0")
    rows = write(Path("rows.jsonl"), *({"prompt": one.prompt, "target": one.target} for one in FAILURES[:2]))
    asked = ["repair", rows, "--model", base, "--served-as", "gguf", "--json", *BOLD.split(), "0.05"]

    def refused(*_: object) -> None:
        raise ModelError("llama.cpp does not load it")

    with monkeypatch.context() as broken:  # the engine stops after the repair: no file is left
        broken.setattr("lmrepair.patch.serving.engines.llama_cpp", refused)
        code, out, err = run(*asked, "--output", "not.safetensors")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert not Path("not.safetensors").exists()

    code, out, err = run(*asked, "--output", "fix.safetensors")
    data = json.loads(out)
    served, margins = data["served"], [one["margin"] for one in data["served"]["tries"]]
    assert code == (1 if served["lost"] or data["repaired"] < data["failing"] else 0)
    assert margins == [0.05, 1.0, 2.0, 4.0, 8.0, 16.0][: len(margins)]
    assert all(one["lost"] for one in served["tries"][:-1])
    assert served["kept"] == max(one["kept"] for one in served["tries"]) > served["before"]
    assert Patch.load("fix.safetensors").made.settings["margin"] == served["margin"] == data["settings"]["margin"]
    code, out, _ = run(
        "verify", "fix.safetensors", "--engine", "llama.cpp", "--base", base, "--rank", "exact", "--json"
    )
    found = json.loads(out)
    assert (found["before"], found["failures"]) == (served["before"], served["of"])


def test_without_the_engine_nothing_begins(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    Path("base.gguf").write_bytes(b"GGUF" + bytes(60))
    rows = write(Path("rows.jsonl"), {"prompt": "a", "target": "b"})
    code, out, err = run("repair", rows, "--model", "base.gguf", "--served-as", "gguf")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "pip install 'lmrepair[engines]'" in err
    assert not list(Path().glob("*.patch.safetensors"))


def test_together_and_side_by_side(run: Run, place: Path) -> None:
    code, out, err = run(
        "compose", "a.safetensors", "b.safetensors", "-o", "c.safetensors", "--model", "model", "--json"
    )
    assert err == ""
    data = json.loads(out)
    assert (data["parts"], data["failures"], code) == (2, 2, 1 if data["lost"] else 0)
    assert run("compose", "c.safetensors", "--without", "b.safetensors", "-o", "d.safetensors")[0] == 0
    code, out, _ = run("diff", "a.safetensors", "d.safetensors", "--json")
    data = json.loads(out)
    assert (code, data["both"], data["first"], data["second"]) == (0, [FAILURES[0].id], [], [])
    assert all(layer["distance"] < 1e-6 for layer in data["layers"])
    code, out, _ = run("show", "c.safetensors")
    assert code == 0
    assert "rank" in out
    code, out, _ = run("conflicts", "a.safetensors", "b.safetensors", "--model", "model", "--json")
    assert json.loads(out)["looked_at"] == 2
    assert code == (1 if json.loads(out)["danger"] else 0)


def test_the_patch_that_broke_it_is_found(run: Run, place: Path) -> None:
    Path("patches").mkdir()
    for name in "ab":
        Path(f"{name}.safetensors").rename(f"patches/{name}.safetensors")
    net = oracle_models.net()
    held = FAILURES[3]
    (text,) = net.generate(net.tokenize([held]))
    write(Path("held.jsonl"), {"prompt": held.prompt, "target": net.tokenizer.decode(text)})
    code, out, err = run("bisect", "--model", "model", "--patches", "patches", "--check", "held.jsonl", "--json")
    if code == 0:
        assert json.loads(out)["number"] in (1, 2)
    else:
        assert "there is nothing to find" in err
    command = "test -f $LMREPAIR_MODEL/config.json"
    code, out, err = run("bisect", "--model", "model", "--patches", "patches", "--check", f"sh -c '! ({command})'")
    assert "fails on the model without any patch" in err
    code, out, err = run("bisect", "--model", "model", "--patches", "patches", "--check", f"sh -c '{command}'")
    assert "there is nothing to find" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("apply a.safetensors --model model", "where to?"),
        ("apply a.safetensors --model model --output o --in-place", "where to?"),
        ("apply a.safetensors --model model --output model", "is the model that is read"),
        ("apply a.safetensors --model model --output a.safetensors", "is no folder"),
        ("export a.safetensors --to pefd x --model model", "did you mean 'peft'"),
        ("export a.safetensors --to peft x", "name the one the patch was made for"),
        ("export a.safetensors --to gguf x", "needs its base"),
        ("export a.safetensors --to gguf x --base model/config.json", "not a sound GGUF file"),
        ("export a.safetensors --to gguf x --model model --architecture lama", "no architecture 'lama'"),
        ("export a.safetensors --to gguf a.safetensors --model model --rank exact", "exists already"),
        ("export a.safetensors --to peft x --model model --rank none", "expected exact, least or"),
        ("compose a.safetensors -o c", "one patch to compose"),
        ("compose a.safetensors a.safetensors -o c", "the same patch twice"),
        ("compose a.safetensors b.safetensors -o b.safetensors", "exists already"),
        ("compose a.safetensors --without b.safetensors -o c", "no such part"),
        ("conflicts a.safetensors --model model", "expected two or more"),
        ("bisect --model model --patches model/none --check x", "no patches in it"),
        ("verify a.safetensors --engine vllm", "unknown engine 'vllm'"),
        ("verify a.safetensors --engine llama.cpp --model model", "llama.cpp runs a GGUF"),
        ("repair rows.jsonl --model model --served-as gguf", "needs the GGUF file that is served"),
        ("repair rows.jsonl --model model --served-as ggml", "did you mean 'gguf'"),
        ("repair rows.jsonl --model model --served-as gguf --alone", "leave --alone out"),
        ("diff a.safetensors model/model.safetensors", "not a patch"),
    ],
)
def test_what_cannot_be_is_a_line_and_changes_nothing(run: Run, place: Path, words: str, message: str) -> None:
    def state() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}

    before = state()
    code, out, err = run(*words.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert state() == before
    assert Patch.load("a.safetensors").serialise() == before["a.safetensors"]
