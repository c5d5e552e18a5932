"""Fixtures of every test: no hub, one seed, and the shared data where it is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with pycoder-8m and the task data; tests that need it skip where it is absent."""
    if not (SHARED / "models" / "pycoder-8m").is_dir():
        pytest.skip("needs ../shared with pycoder-8m and its data, which users do not have")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Statistics are kept for the length of a run of tests, and never in the user's folder."""
    os.environ["LMREPAIR_CACHE"] = str(tmp_path_factory.mktemp("cache"))
