"""Fixtures of every test: no hub, one seed, a cache of its own, and the shared data where it is there."""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import ROWS, Run, write
from costs import Costs
from hypothesis import settings
from slow import slow_tests

from lmrepair import cli

# What imports make stays: looking through it for garbage, again and again, is a sixth of a worker's start.
gc.disable()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Workers run side by side: one thread each, in the processes they start, too. Threads that wait for one
# another spin, and beside any other process that costs several times the work itself. Read as torch is imported.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

SHARED = Path(__file__).resolve().parents[2] / "shared"

# The same examples in every run: what fails here fails everywhere. LMREPAIR_EXAMPLES=random looks for new ones.
settings.register_profile("same", derandomize=True, database=None)
settings.register_profile("random")
settings.load_profile(os.environ.get("LMREPAIR_EXAMPLES", "same"))


def pytest_configure(config: pytest.Config) -> None:
    if "LMREPAIR_COSTS" in os.environ:
        config.pluginmanager.register(Costs(Path(os.environ["LMREPAIR_COSTS"])))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that slow.txt names, so that ``make quick`` leaves them out; a new test is in it by default.

    Modules whose slow tests take longest come first, so that no worker is left with a long one at the end.
    """
    slow = slow_tests()
    weights: Counter[str] = Counter()
    for name, seconds in slow.items():
        weights[name.split("::")[0]] += round(1000 * seconds)
    names = {item: item.nodeid.split("[")[0].removeprefix("tests/") for item in items}
    for item in items:
        if names[item] in slow:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: -weights[names[item].split("::")[0]])


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder where statistics are kept: never the user's, in this process or in those it starts.

    Workers that run side by side share it: the statistics of the model that ships are gathered once.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMREPAIR_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with pycoder-8m and the task data; tests that need it skip where it is absent."""
    if not (SHARED / "models" / "pycoder-8m").is_dir():
        pytest.skip("needs ../shared with pycoder-8m and its data, which users do not have")
    return SHARED


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Call the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lmrepair", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def failures(tmp_path: Path) -> Path:
    """A file of two failures of the model that ships."""
    return write(tmp_path / "failures.jsonl", *ROWS)
