"""Whole numbers that are mostly zero, as few bits: distances between the others in Rice's code, sizes in Elias' gamma.

Nothing is ever made that is longer than a few numbers for each bit of what is read.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LONGEST = 33  # bits of the largest size
_COUNT = 8  # bytes that say how many numbers are not zero
_RICE = 24  # most low bits of a distance that are written as they are

Integers = NDArray[np.int64]
Bits = NDArray[np.uint8]


def pack(places: Integers, values: Integers) -> bytes:
    """The bytes of ``values`` [n] (none is 0, at most 2^33 − 1 in size) at ``places`` [n], sorted and unique.

    In order: n (8 bytes), the Rice parameter k (1 byte), and as bits, filled up with zeros: of each distance
    g from the place before (−1 at first), less one, g >> k in unary; the low k bits of each; the lengths of
    all sizes less one, in unary; the sizes without their leading bit; the signs. Low bits come first.
    """
    gaps = np.diff(places, prepend=-1) - 1
    low = max(0, min(_RICE, int(np.log2(max(1.0, gaps.mean() * 0.7))))) if len(gaps) else 0
    sizes = np.abs(values)
    lengths = _lengths(sizes)
    bits = np.concatenate(
        [
            _unary(gaps >> low),
            ((gaps[:, None] >> np.arange(low)) & 1).astype(np.uint8).ravel(),
            _unary(lengths - 1),
            _tails(sizes, lengths),
            (values < 0).astype(np.uint8),
        ]
    )
    return len(values).to_bytes(_COUNT, "little") + bytes([low]) + np.packbits(bits, bitorder="little").tobytes()


def unpack(raw: bytes) -> tuple[Integers, Integers]:
    """Places and values of what ``pack`` wrote. Raises ValueError for bytes that it cannot have written."""
    bits = np.unpackbits(np.frombuffer(raw, np.uint8)[_COUNT + 1 :], bitorder="little")
    count, low = int.from_bytes(raw[:_COUNT], "little"), raw[_COUNT] if len(raw) > _COUNT else _RICE + 1
    if count > len(bits) or low > _RICE:
        raise ValueError("whole numbers that are cut off")
    high, at = _counts(bits, 0, count)
    lowest, at = _taken(bits, at, count * low)
    gaps = (high << low) + lowest.reshape(count, low).astype(np.int64) @ (np.int64(1) << np.arange(low))
    lengths, at = _counts(bits, at, count)
    if bool((lengths >= LONGEST).any()):
        raise ValueError("whole numbers that are too long")
    tails, at = _taken(bits, at, int(lengths.sum()))
    signs, at = _taken(bits, at, count)
    if len(bits) - at >= 8 or bits[at:].any():
        raise ValueError("whole numbers with something behind them")
    sizes = _sizes(tails, lengths)
    return np.cumsum(gaps + 1) - 1, np.where(signs == 1, -sizes, sizes)


def _lengths(sizes: Integers) -> Integers:
    """How many bits each number [n] above 0 has."""
    found = np.zeros_like(sizes)
    for bit in range(LONGEST):
        found += (sizes >> bit) > 0
    return found


def _unary(counts: Integers) -> Bits:
    """For each count that many zeros, then a one."""
    ends = np.cumsum(counts + 1)
    bits = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    bits[ends - 1] = 1
    return bits


def _counts(bits: Bits, at: int, count: int) -> tuple[Integers, int]:
    """What ``_unary`` wrote from ``at`` on, and where it ends."""
    ends = np.flatnonzero(bits[at:])[:count].astype(np.int64)
    if len(ends) < count:
        raise ValueError("whole numbers that are cut off")
    return np.diff(ends, prepend=-1) - 1, at + (int(ends[-1]) + 1 if count else 0)


def _taken(bits: Bits, at: int, count: int) -> tuple[Bits, int]:
    if at + count > len(bits):
        raise ValueError("whole numbers that are cut off")
    return bits[at : at + count], at + count


def _tails(sizes: Integers, lengths: Integers) -> Bits:
    """All bits below the leading one of each number."""
    starts = np.cumsum(lengths - 1) - (lengths - 1)
    bits = np.zeros(int((lengths - 1).sum()), np.uint8)
    for bit in range(LONGEST - 1):
        has = lengths - 1 > bit
        bits[starts[has] + bit] = (sizes[has] >> bit) & 1
    return bits


def _sizes(tails: Bits, lengths: Integers) -> Integers:
    """The numbers with ``lengths`` [n] bits below their leading one."""
    starts = np.cumsum(lengths) - lengths
    sizes = np.int64(1) << lengths
    for bit in range(LONGEST - 1):
        has = lengths > bit
        sizes[has] += tails[starts[has] + bit].astype(np.int64) << bit
    return sizes
