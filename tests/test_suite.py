"""The suite itself: the list of slow tests names tests, and the score of a mutation run is what it says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from mutants import wilson
from slow import slow_tests

HERE = Path(__file__).parent


def test_what_is_called_slow_is_there() -> None:
    for name in slow_tests():
        file, _, test = name.partition("::")
        found = ast.parse((HERE / file).read_text(encoding="utf-8")).body
        assert test in {item.name for item in found if isinstance(item, ast.FunctionDef)}, f"slow.txt: no {name}"


def test_the_interval_of_a_score_is_wilsons() -> None:
    """Its ends are where the normal test of the share turns: (hits/n - p)^2 = z^2 p (1 - p) / n."""
    for hits, count in ((85, 100), (1, 7), (60, 60)):
        for end in wilson(hits, count):
            assert (hits / count - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / count, abs=1e-12)
