"""The suite itself: the list of slow tests names tests, and the score of a mutation run is what it says."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from mutants import wilson
from slow import HEAD, listed, slow_tests

HERE = Path(__file__).parent


def test_what_is_called_slow_is_there() -> None:
    places = [name.partition("::") for name in slow_tests()]
    for file in {file for file, _, _ in places}:
        found = ast.parse((HERE / file).read_text(encoding="utf-8")).body
        there = {item.name for item in found if isinstance(item, ast.FunctionDef)}
        assert {test for place, _, test in places if place == file} <= there, f"slow.txt: {file}"


def test_a_test_is_slow_by_the_mean_of_its_parameters() -> None:
    costs = {
        "tests/a/test_b.py::test_c[x-y::z]": 0.3,
        "tests/a/test_b.py::test_c[2]": 0.1,
        "tests/test_d.py::test_e": 0.2,
    }
    rows = [json.dumps({"test": name, "seconds": seconds, "shared": {"net": 9.0}}) for name, seconds in costs.items()]
    assert listed(rows, 0.19) == HEAD + "a/test_b.py::test_c 0.4\ntest_d.py::test_e 0.2\n"
    assert listed(rows, 0.2) == HEAD


def test_the_interval_of_a_score_is_wilsons() -> None:
    """Its ends are where the normal test of the share turns: (hits/n - p)^2 = z^2 p (1 - p) / n."""
    for hits, count in ((85, 100), (1, 7), (60, 60)):
        for end in wilson(hits, count):
            assert (hits / count - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / count, abs=1e-12)
