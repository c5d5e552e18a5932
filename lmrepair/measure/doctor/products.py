"""How quick a dtype's matrix products are where a model is: some processors have none in half precision."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from lmrepair.model import Net

ROWS, SIDE = 64, 1024  # of what is multiplied: states, and the most of a matrix's sides
PASSES, ENOUGH = 3, 1.0  # how many passes a time is the median of; no more are made after so many seconds


def slowness(net: Net) -> float:
    """How many times as long as in float32 a backward pass's products take in the model's dtype, where it is."""
    if net.dtype == torch.float32:
        return 1.0
    sides = min(SIDE, max(net.widths)), min(SIDE, net.hidden)
    return _seconds(net, net.dtype, sides) / _seconds(net, torch.float32, sides)


def timed(net: Net, run: Callable[[], object]) -> float:
    """Seconds, the median of a few runs where the net is."""
    times: list[float] = []
    while len(times) < PASSES and sum(times) < ENOUGH:
        began = time.perf_counter()
        run()
        if net.device.type == "cuda":
            torch.cuda.synchronize(net.device)
        times.append(time.perf_counter() - began)
    return median(times)


def _seconds(net: Net, dtype: torch.dtype, sides: tuple[int, int]) -> float:
    states = torch.ones(ROWS, sides[0], dtype=dtype, device=net.device)
    matrix = torch.ones(sides, dtype=dtype, device=net.device)
    return timed(net, lambda: states @ matrix)
