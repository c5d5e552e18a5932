"""SmolLM2-135M-Instruct, where it was fetched: once for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmrepair import load
from lmrepair.model import Net

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "models" / "smollm2-135m-instruct.gguf"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.real)


@pytest.fixture(scope="session")
def file() -> Path:
    if not FILE.exists():
        pytest.skip("needs SmolLM2: `make models` fetches it, `make real` runs these tests")
    pytest.importorskip("gguf", reason="needs the extra gguf: pip install 'lmrepair[gguf]'")
    return FILE


@pytest.fixture(scope="session")
def net(file: Path) -> Net:
    return load(file)
