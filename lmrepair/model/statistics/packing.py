"""A moment in few bytes: correlations in 16 bits beside an exact diagonal, sampled rows in bfloat16.

Of the blocks of a mixture all correlations within an expert are kept.

A full moment is symmetric: strips of its rows are kept from the diagonal on, a little more than half of it. What
is rounded are correlations, to 2⁻¹⁵, so that a direction that text hardly uses keeps its place beside one that
it uses a thousand times as much.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lmrepair.model.statistics.moments import Moment, blocks

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
    if moment.kind == "blocks":
        rounded = [
            _rounded(moment.values[: one.stop - one.start, one], sizes[one], sizes[one])
            for one in blocks(moment.widths)
        ]
        return {**found, "blocks": Moment.of_blocks(rounded).values, "widths": torch.tensor(moment.widths)}
    for number, rows in enumerate(strips(len(diagonal))):
        found[f"strip.{number}"] = _rounded(moment.values[rows, rows.start :], sizes[rows], sizes[rows.start :])
    return found


def _rounded(part: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return (part / (rows[:, None] * columns) * STEPS).round_().clamp_(-STEPS, STEPS).to(torch.int16)


def unpack(packed: Packed) -> Moment:
    """The moment in float32."""
    if "rows" in packed:
        return Moment("sampled", packed["rows"].float())
    diagonal = packed["diagonal"]
    if len(packed) == 1:
        return Moment("diagonal", diagonal)
    sizes = diagonal.sqrt()
    if "blocks" in packed:
        parts = []
        for one in blocks(packed["widths"].tolist()):
            part = packed["blocks"][: one.stop - one.start, one].float().div_(STEPS).mul_(sizes[one, None] * sizes[one])
            part.diagonal().copy_(diagonal[one])
            parts.append(part)
        return Moment.of_blocks(parts)
    values = torch.empty(len(diagonal), len(diagonal))
    for number, rows in enumerate(strips(len(diagonal))):
        part = packed[f"strip.{number}"].float().div_(STEPS).mul_(sizes[rows, None] * sizes[rows.start :])
        values[rows.start :, rows] = part.T
        values[rows, rows.start :] = part
    values.diagonal().copy_(diagonal)
    return Moment("full", values)


def shapes(kind: str, widths: Sequence[int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What ``pack`` makes of a moment of a kind, of experts of these widths (of sampled rows any number: −1)."""
    width = sum(widths)
    if kind == "sampled":
        return {"rows": (torch.bfloat16, (-1, width))}
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"diagonal": (torch.float32, (width,))}
    if kind == "blocks":
        found |= {"blocks": (torch.int16, (max(widths), width)), "widths": (torch.int64, (len(widths),))}
    if kind == "full":
        for number, rows in enumerate(strips(width)):
            found[f"strip.{number}"] = (torch.int16, (rows.stop - rows.start, width - rows.start))
    return found


def size(kind: str, widths: Sequence[int], samples: int) -> int:
    """Bytes of a packed moment."""
    total = 0
    for dtype, (*rows, columns) in shapes(kind, widths).values():
        total += dtype.itemsize * columns * (1 if not rows else samples if rows[0] < 0 else rows[0])
    return total
