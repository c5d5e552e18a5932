"""What a run does beside its work: it says how far it is, gives memory back, and holds a Ctrl-C back."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

Progress = Callable[[str, int, int], None]  # stage, done, total

# Bytes from which on a block of memory is given back by itself. glibc learns larger ones as a model is loaded, and
# then keeps what is freed between the metric's factors: 240 MB of SmolLM2's peak.
M_MMAP_THRESHOLD, APART = -3, 1 << 22
ELSEWHERE = (OSError, AttributeError, TypeError)  # another C library has no such setting, and no such function


def quiet(stage: str, done: int, total: int) -> None:
    """Report no progress."""


def keep_blocks_apart() -> None:
    """Have large blocks of memory given back as soon as they are freed; for a process that loads a model."""
    with suppress(*ELSEWHERE):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, APART)


def give_back() -> None:
    """Give back what small blocks that are freed by now leave between those that are not.

    Behind a stage that took many: what statistics are summed up in stays in glibc's heap else, 340 MB on SmolLM2.
    """
    with suppress(*ELSEWHERE):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold a Ctrl-C back until the block is done (only the main thread receives one)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pending.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pending and callable(before):
            before(*pending[0])
