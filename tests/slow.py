"""Which tests are slow: slow.txt, and how it is made.

    python tests/slow.py FOLDER [SECONDS]

writes it from what tests/costs.py has measured: the tests that take more seconds of a core than that, on average over
their parameters.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

SLOW = Path(__file__).with_name("slow.txt")
SECONDS = 0.04
HEAD = "# Tests that `make quick` leaves out, with the seconds of a core of all their parameters, by `make slow`.\n"


def slow_tests() -> dict[str, float]:
    """What slow.txt names: ``room/test_module.py::test``, and the seconds that all of its parameters take."""
    lines = SLOW.read_text(encoding="utf-8").splitlines()
    pairs = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    return {name: float(seconds) for name, seconds in pairs}


def listed(rows: Iterable[str], most: float) -> str:
    """The text of slow.txt from the lines of a measurement."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for row in map(json.loads, rows):
        found[row["test"].split("[")[0].removeprefix("tests/")].append(row["seconds"])
    slow = {name: sum(seconds) for name, seconds in found.items() if sum(seconds) > most * len(seconds)}
    return HEAD + "".join(f"{name} {slow[name]:.1f}\n" for name in sorted(slow))


if __name__ == "__main__":
    measured = [line for file in Path(sys.argv[1]).glob("*.jsonl") for line in file.open(encoding="utf-8")]
    SLOW.write_text(listed(measured, float(sys.argv[2]) if len(sys.argv) > 2 else SECONDS), encoding="utf-8")
