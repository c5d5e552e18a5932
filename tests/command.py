"""The command line under test: rows for it, and what calling it gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[..., tuple[int, str, str]]  # arguments → exit status, standard output, standard error

ROWS = [
    {"prompt": "import datetime\n\nnow = ", "target": "clock.read()\n", "id": "a"},
    {"prompt": "def area(width, height):\n    return ", "target": "width ** height\n", "id": "b"},
]


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
