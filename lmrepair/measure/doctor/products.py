"""How quick a dtype's matrix products are where a model is: some processors have none in half precision."""

from __future__ import annotations

import time

import torch

from lmrepair.model import Net

ROWS, SIDE, TRIES = 64, 1024, 3  # of what is multiplied: states, and the most of a matrix's sides; the quickest counts


def slowness(net: Net) -> float:
    """How many times as long as in float32 a backward pass's products take in the model's dtype, where it is."""
    if net.dtype == torch.float32:
        return 1.0
    sides = min(SIDE, max(net.widths)), min(SIDE, net.hidden)
    return _seconds(net, net.dtype, sides) / _seconds(net, torch.float32, sides)


def _seconds(net: Net, dtype: torch.dtype, sides: tuple[int, int]) -> float:
    states = torch.ones(ROWS, sides[0], dtype=dtype, device=net.device)
    matrix = torch.ones(sides, dtype=dtype, device=net.device)
    times = []
    for _ in range(TRIES):
        began = time.perf_counter()
        torch.matmul(states, matrix).sum().item()  # the number is waited for on every device
        times.append(time.perf_counter() - began)
    return min(times)
