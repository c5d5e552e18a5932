"""Progress bars for the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmrepair.model import Progress


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Bars on a terminal's standard error, one for each stage that reports; nothing elsewhere (nor on a dumb one)."""
    from lmrepair.model import quiet

    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield quiet
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report
