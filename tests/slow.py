"""Which tests are slow: those that slow.txt names."""

from __future__ import annotations

from pathlib import Path

SLOW = Path(__file__).with_name("slow.txt")


def slow_tests() -> list[str]:
    """What slow.txt names: ``room/test_module.py::test``, all of its parameters."""
    lines = SLOW.read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]
