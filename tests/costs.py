"""What every test and fixture costs, in seconds of a core: LMREPAIR_COSTS=FOLDER pytest … writes a file a worker."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def spent() -> float:
    """Of this process, and of those that it started and that have ended."""
    return time.process_time() + sum(os.times()[2:4])


class Costs:
    """Writes a line a test: what its phases cost, and of that what went into each fixture made for it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / (os.environ.get("PYTEST_XDIST_WORKER", "main") + ".jsonl")
        self.fixtures: dict[str, float] = {}
        self.inner = 0.0
        self.write({"test": "START", "spent": spent()})

    def write(self, row: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self) -> Iterator[None]:
        before = spent()
        result = yield
        self.write({"test": "COLLECT", "spent": spent() - before})
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionfinish(self) -> Iterator[None]:
        result = yield
        self.write({"test": "END", "spent": spent()})
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[Any]:
        outer, self.inner = self.inner, 0.0
        before = spent()
        try:
            return (yield)
        finally:
            took = spent() - before
            name = f"{fixturedef.scope}:{fixturedef.argname}"
            self.fixtures[name] = self.fixtures.get(name, 0.0) + took - self.inner
            self.inner = outer + took

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[Any]:
        self.fixtures, self.inner = {}, 0.0
        before = spent()
        result = yield
        self.write({"test": item.nodeid, "spent": spent() - before, "fixtures": self.fixtures})
        return result
