"""A disk that is full at any byte, and every byte of patch files damaged: a line of ours, everything as it was.

python tests/hard/full.py --limits 300
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import oracle_models
import torch
from factored import factored, made_up
from full_disk import all_writes, tried_full
from oracle_models import FAILURES

from lmrepair import Patch
from lmrepair.errors import PatchError

MEMORY = Path("/dev/shm")  # where files cost no disk
DAMAGES = (0x01, 0x80)  # and one at random


def ten_patches() -> list[bytes]:
    """Small ones of both kinds, of three dtypes and two architectures."""
    found = []
    for kind in oracle_models.KINDS:
        for at, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
            net = oracle_models.net(kind, dtype=dtype)
            patch = made_up(net, FAILURES[at : at + 1], seed=at, share=16)
            found += [patch.serialise(), factored(net, patch, rank=1 + at).serialise()]
    return found[:10]


def tried_bytes(raw: bytes, path: Path, chance: random.Random) -> int:
    """Every byte changed in three ways; gives how many files that were, all of them refused."""
    for at in range(len(raw)):
        for change in (*DAMAGES, chance.randrange(1, 256)):
            path.write_bytes(raw[:at] + bytes([raw[at] ^ change]) + raw[at + 1 :])
            try:
                Patch.load(path)
            except PatchError:
                continue
            sys.exit(f"byte {at} of {len(raw)} changed by {change:#x}: the patch was read")
    return 3 * len(raw)


def main() -> None:
    """Try both, and say what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limits", type=int, default=300, help="for each kind of writing")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name:
        room = Path(name)
        for writes in all_writes(room, oracle_models.net()):
            print(f"full disk, {writes.name}: {dict(tried_full(writes, given.limits, chance))}", flush=True)
        path = room / "damaged.safetensors"
        total = sum(tried_bytes(raw, path, chance) for raw in ten_patches())
    print(f"every byte of ten patches changed in three ways: {total} files, all refused")


if __name__ == "__main__":
    main()
