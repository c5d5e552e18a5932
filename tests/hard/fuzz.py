"""Damaged files to every reader: nothing but our own errors, no hang, no memory beyond a bound.

    python tests/hard/fuzz.py --inputs 1000000 --memory 3

Sound files are damaged at random (bits, cuts, copies, words of the header), patches with a digest that fits
again in half of the cases, so that what stands behind the digest is reached too.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import oracle_models
import torch
from factored import factored, made_up
from oracle_models import FAILURES

from lmrepair import LmrepairError, Patch, read_failures, read_reference
from lmrepair.patch.disk.stored import INDEX, read_checkpoint
from lmrepair.patch.format import _stamp

WORDS = [
    b"0",
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"[]",
    b"{}",
    b'""',
    b"99999999999999999999",
    b'"\\ud800"',
    b"true",
    b"[[[[",
]
SLOW = 5.0  # seconds for one input


def damaged(raw: bytes, chance: random.Random) -> bytes:
    """The bytes with one to four things done to them."""
    data = bytearray(raw)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice([1, 2, 8, 64]))
        kind = chance.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[at:end]
        elif kind == 2:
            data[at:at] = data[at:end]
        elif kind == 3:
            data[at:end] = chance.choice(WORDS)
        elif kind == 4:
            data[at:end] = chance.randbytes(end - at)
        elif len(data) > 8:
            data[:8] = struct.pack("<Q", chance.choice([0, 1, 2**63, len(data), chance.randrange(2**32)]))
    return bytes(data)


def header_damaged(raw: bytes, chance: random.Random) -> bytes:
    """A safetensors file with its header damaged, its length right, and for a patch a digest that fits."""
    length = struct.unpack("<Q", raw[:8])[0]
    head = damaged(raw[8 : 8 + length], chance)
    made = struct.pack("<Q", len(head)) + head + raw[8 + length :]
    try:
        return _stamp(made)
    except LmrepairError:
        return made


def readers(folder: Path) -> list[tuple[str, bytes, Callable[[Path], object]]]:
    """Name, a sound file, and what reads it."""
    net = oracle_models.net()
    patch = made_up(net, FAILURES[:1], share=16)
    patches = [patch.serialise(), factored(net, patch).serialise()]
    net.model.save_pretrained(folder / "model", max_shard_size="20KB")
    shard = next((folder / "model").glob("*.safetensors"))
    rows = [
        {"prompt": "a", "target": "b\n", "id": "x", "paraphrases": ["c"]},
        {"messages": [{"role": "user", "content": "d"}], "target": "e"},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()

    def checkpoint(path: Path, name: str) -> object:
        place, sound = folder / "model" / name, (folder / "model" / name).read_bytes()
        try:
            place.write_bytes(path.read_bytes())
            return read_checkpoint(folder / "model")
        finally:
            place.write_bytes(sound)

    return [
        ("patch of neurons", patches[0], Patch.load),
        ("patch of factors", patches[1], Patch.load),
        ("failures", lines, read_failures),
        ("reference", b'{"text": "one"}\n{"text": "two"}\n', read_reference),
        ("shard", shard.read_bytes(), lambda path: checkpoint(path, shard.name)),
        ("index", (folder / "model" / INDEX).read_bytes(), lambda path: checkpoint(path, INDEX)),
    ]


def main() -> None:
    """Read as many damaged files as asked, and say what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--memory", type=float, default=3.0, help="GB of memory that the process may have, in all")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    torch.set_num_threads(1)
    found: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as name:
        known = readers(Path(name))
        limit = int(given.memory * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        path = Path(name) / "input.safetensors"
        for at in range(given.inputs):
            kind, sound, read = known[at % len(known)]
            binary = kind.startswith(("patch", "shard"))
            raw = header_damaged(sound, chance) if binary and chance.random() < 0.5 else damaged(sound, chance)
            path.write_bytes(raw)
            start = time.perf_counter()
            try:
                read(path)
                found[f"{kind}: read"] += 1
            except LmrepairError:
                found[f"{kind}: refused"] += 1
            except BaseException as error:  # noqa: BLE001 (that is what is looked for)
                Path("fuzz.failed").write_bytes(raw)
                sys.exit(f"input {at} ({kind}, kept as fuzz.failed): {type(error).__name__}: {error}")
            slowest = max(slowest, time.perf_counter() - start)
            if slowest > SLOW:
                Path("fuzz.failed").write_bytes(raw)
                sys.exit(f"input {at} ({kind}, kept as fuzz.failed) took {slowest:.1f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{given.inputs} inputs, slowest {slowest:.3f} s, peak {peak:.2f} GB: {dict(sorted(found.items()))}")


if __name__ == "__main__":
    main()
