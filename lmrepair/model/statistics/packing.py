"""A moment in few bytes: correlations in 16 bits beside an exact diagonal, sampled rows in bfloat16.

A full moment is symmetric: strips of its rows are kept from the diagonal on, a little more than half of it. What
is rounded are correlations, to 2⁻¹⁵, so that a direction that text hardly uses keeps its place beside one that
it uses a thousand times as much.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lmrepair.model.moments import Moment

STRIPS = 8
STEPS = 32767  # of a correlation between 0 and 1

Packed = Mapping[str, Tensor]


def strips(width: int) -> Iterator[slice]:
    """The rows of a symmetric matrix, strip by strip; of each the columns from its first row on are its own."""
    step = -(-width // STRIPS)
    for start in range(0, width, step):
        yield slice(start, min(start + step, width))


def pack(moment: Moment) -> dict[str, Tensor]:
    """The tensors that are kept of a moment, by name."""
    if moment.kind == "sampled":
        return {"rows": moment.values.bfloat16()}
    diagonal = moment.diagonal.float().contiguous()
    if moment.kind == "diagonal":
        return {"diagonal": diagonal}
    found = {"diagonal": diagonal}
    sizes = diagonal.clamp(min=1e-38).sqrt()
    for number, rows in enumerate(strips(len(diagonal))):
        part = moment.values[rows, rows.start :] / (sizes[rows, None] * sizes[rows.start :])
        found[f"strip.{number}"] = (part * STEPS).round_().clamp_(-STEPS, STEPS).to(torch.int16)
    return found


def unpack(packed: Packed) -> Moment:
    """The moment in float32."""
    if "rows" in packed:
        return Moment("sampled", packed["rows"].float())
    diagonal = packed["diagonal"]
    if len(packed) == 1:
        return Moment("diagonal", diagonal)
    sizes = diagonal.sqrt()
    values = torch.empty(len(diagonal), len(diagonal))
    for number, rows in enumerate(strips(len(diagonal))):
        part = packed[f"strip.{number}"].float().div_(STEPS).mul_(sizes[rows, None] * sizes[rows.start :])
        values[rows.start :, rows] = part.T
        values[rows, rows.start :] = part
    values.diagonal().copy_(diagonal)
    return Moment("full", values)


def shapes(kind: str, width: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What ``pack`` makes of a moment of a kind (but for how many sampled rows there are: −1)."""
    if kind == "sampled":
        return {"rows": (torch.bfloat16, (-1, width))}
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"diagonal": (torch.float32, (width,))}
    if kind == "full":
        for number, rows in enumerate(strips(width)):
            found[f"strip.{number}"] = (torch.int16, (rows.stop - rows.start, width - rows.start))
    return found


def size(kind: str, width: int, samples: int) -> int:
    """Bytes of a packed moment."""
    total = 0
    for dtype, (*rows, columns) in shapes(kind, width).values():
        total += dtype.itemsize * columns * (1 if not rows else samples if rows[0] < 0 else rows[0])
    return total
