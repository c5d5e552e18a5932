"""What tests cost: LMREPAIR_COSTS=FOLDER pytest … writes a file a process, from which slow.py makes slow.txt."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def spent() -> float:
    """Seconds of a core, of this process and of those it has started that have ended."""
    return time.process_time() + sum(os.times()[2:4])


class Costs:
    """Writes a line a test: its name, its seconds of a core, and beside them those of what is made once for several."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / (os.environ.get("PYTEST_XDIST_WORKER", "main") + ".jsonl")
        self.shared: dict[str, float] = {}
        self.inner = 0.0  # what fixtures that another one asked for have taken

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[Any]:
        outer, self.inner, before = self.inner, 0.0, spent()
        try:
            return (yield)
        finally:
            took = spent() - before
            if fixturedef.scope != "function":
                self.shared[fixturedef.argname] = took - self.inner
                self.inner = took
            self.inner += outer

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[Any]:
        self.shared, self.inner, before = {}, 0.0, spent()
        result = yield
        row = {"test": item.nodeid, "seconds": spent() - before - sum(self.shared.values()), "shared": self.shared}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return result
