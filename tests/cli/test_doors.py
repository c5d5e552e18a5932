"""Doors through which a file could run code: each is tried with a payload that would leave a mark."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle_models
import pytest
import torch
from command import ROWS, Run, write

from lmrepair import load
from lmrepair.failures import shipped
from lmrepair.methods import MinKl
from lmrepair.model import statistics_of
from lmrepair.patch import save_model

HOSTILE = "{{ cycler.__init__.__globals__.os.system('touch ran') }}"


class Evil:
    """Unpickled, it makes the file ``ran`` in the current folder."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder in the folder that commands run in."""
    shutil.copytree(Path(str(shipped("model"))), tmp_path / "model")
    write(tmp_path / "rows.jsonl", *ROWS)
    return tmp_path


@pytest.fixture(params=["pickle", "torch", "torch, as it was"])
def evil(request: pytest.FixtureRequest, folder: Path) -> Path:
    """A file that runs a command where it is unpickled."""
    path = folder / "evil.bin"
    if request.param == "pickle":
        path.write_bytes(pickle.dumps(Evil()))
    else:
        torch.save({"lm_head.weight": Evil()}, path, _use_new_zipfile_serialization=request.param == "torch")
    return path


OPENED = {
    "model": ["diagnose", "rows.jsonl", "--model", "evil.bin"],
    "failures": ["diagnose", "evil.bin"],
    "patch": ["show", "evil.bin"],
    "patch to verify": ["verify", "evil.bin"],
    "patch to apply": ["apply", "evil.bin", "--model", "model", "--output", "out"],
    "patch to take back": ["revert", "evil.bin", "--model", "model", "--output", "out"],
    "patch to export": ["export", "evil.bin", "--to", "merged", "out", "--model", "model"],
    "patches to compose": ["compose", "evil.bin", "evil.bin", "-o", "out"],
    "patches to compare": ["diff", "evil.bin", "evil.bin"],
    "memory": ["repair", "rows.jsonl", "--memory", "evil.bin"],
    "protected": ["repair", "rows.jsonl", "--protect", "evil.bin"],
    "reference": ["repair", "rows.jsonl", "--reference", "evil.bin"],
    "statistics": ["repair", "rows.jsonl", "--statistics", "evil.bin"],
    "grid": ["bench", "evil.bin", "--output", "out"],
    "tasks": ["check", "evil.bin", "--unsafe"],
    "grid of side effects": ["evaluate", "rows.jsonl", "--grid", "evil.bin"],
}


def test_the_payload_would_run(evil: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(evil.parent)
    if "pickle" in str(evil.read_bytes()[:1]) or evil.read_bytes()[:2] == b"\x80\x04":
        pickle.loads(evil.read_bytes())  # noqa: S301
    else:
        torch.load(evil, weights_only=False)
    assert (evil.parent / "ran").exists()


@pytest.mark.parametrize("door", OPENED)
def test_no_pickle_is_opened(door: str, evil: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmrepair.model.load", lambda *given, **_: load(*given) if given[0] else oracle_models.net())
    code, out, err = run(*OPENED[door])
    assert not Path("ran").exists()
    assert (code, out, err.count("lmrepair: error:")) == (2, "", 1), err


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "tokenizer.json", "tokenizer.model"])
def test_no_pickle_in_a_model_folder_is_opened(name: str, evil: Path, run: Run) -> None:
    model = evil.parent / "model"
    if name == "pytorch_model.bin":
        (model / "model.safetensors").unlink()
    shutil.copy(evil, model / name)
    code, _, _ = run("diagnose", "rows.jsonl", "--model", "model")
    assert not Path("ran").exists()
    assert code == (1 if name == "tokenizer.model" else 2)  # which is not read beside a tokenizer.json


def test_no_pickle_among_kept_statistics_is_opened(evil: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    net, cache = oracle_models.net(), tmp_path / "cache"
    asked = MinKl().asks()
    first = statistics_of(net, asked, own=1, cache=cache)
    (kept,) = cache.glob("*.safetensors")
    shutil.copy(evil, kept)
    again = statistics_of(net, asked, own=1, cache=cache)
    assert not Path("ran").exists()
    assert again.tokens == first.tokens


def test_no_code_beside_results_or_in_a_report(folder: Path, run: Run) -> None:
    (folder / "out").mkdir()
    for content in (pickle.dumps(Evil()), json.dumps({"format": 1, "name": HOSTILE, "status": "done"}).encode()):
        (folder / "out" / "cell.json").write_bytes(content)
        code, _, err = run("report", "out", "--output", "page.html")
        assert not Path("ran").exists()
        assert code == 2 or HOSTILE.split("(")[0] in Path("page.html").read_text(), err


def test_parquet_extension_types_are_not_unpickled(folder: Path, run: Run) -> None:
    arrow = pytest.importorskip("pyarrow", reason="needs the extra parquet")
    parquet = pytest.importorskip("pyarrow.parquet")
    mark = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickle.dumps(Evil())}
    schema = arrow.schema([arrow.field("prompt", arrow.string(), metadata=mark), arrow.field("target", arrow.string())])
    parquet.write_table(arrow.table({"prompt": ["x = "], "target": ["1"]}, schema=schema), folder / "rows.parquet")
    code, _, err = run("diagnose", "rows.parquet")
    assert not Path("ran").exists()
    assert code in (1, 2), err


def _template_file(model: Path) -> None:
    (model / "chat_template.jinja").write_text(HOSTILE)


def _one_of_several(model: Path) -> None:
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text(HOSTILE)
    (model / "chat_template.jinja").write_text("{% include 'tool_use.jinja' %}")


def _reads_files(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{% include '/etc/passwd' %}{% import 'os' as os %}")


@pytest.mark.parametrize("spoil", [_template_file, _one_of_several, _reads_files])
def test_templates_in_files_run_in_the_sandbox(spoil: Callable[[Path], None], folder: Path, run: Run) -> None:
    save_model(oracle_models.net(), folder / "chat")
    spoil(folder / "chat")
    write(folder / "chats.jsonl", {"messages": [{"role": "user", "content": "hi"}], "target": "b"})
    code, _, err = run("diagnose", "chats.jsonl", "--model", "chat")
    assert not Path("ran").exists()
    assert code == 2
    assert "failure '1'" in err


@pytest.mark.parametrize("door", ["generate", "sub-config", "elsewhere", "tokenizer class"])
def test_other_code_of_a_folder_does_not_run(door: str, folder: Path, run: Run) -> None:
    save_model(oracle_models.net(), folder / "own")
    own = folder / "own"
    (own / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    config = json.loads((own / "config.json").read_text())
    words = json.loads((own / "tokenizer_config.json").read_text())
    if door == "generate":
        (own / "custom_generate").mkdir()
        shutil.copy(own / "evil.py", own / "custom_generate" / "generate.py")
    elif door == "sub-config":
        config["text_config"] = {"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"}
    elif door == "elsewhere":
        config["auto_map"] = {"AutoModelForCausalLM": "someone/else--evil.Evil"}
    else:
        words.update(tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    (own / "config.json").write_text(json.dumps(config))
    (own / "tokenizer_config.json").write_text(json.dumps(words))
    code, _, err = run("diagnose", "rows.jsonl", "--model", "own")
    assert not (folder / "ran").exists()
    assert code == 1 or (code == 2 and err.count("lmrepair: error:") == 1), err
