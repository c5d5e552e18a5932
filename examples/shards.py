r"""A repair of a model that lies on several devices as shards, one process (rank) for each.

    torchrun --nproc-per-node 2 examples/shards.py failures.jsonl --model my/model --output fix.safetensors
    torchrun --nproc-per-node 2 examples/shards.py failures.jsonl --model my/mixture --output fix.safetensors \
        --shards experts
    torchrun --nproc-per-node 2 examples/shards.py failures.jsonl --model my/model --output fix.safetensors \
        --shards fsdp

All ranks solve for the same change, and each writes what it holds; the first one saves the patch, which is that of one
process: ``lmrepair verify fix.safetensors --model my/model`` checks it there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import lmrepair
from lmrepair.failures import MAX_KL, read_kinds


def main() -> int:
    """Repair on all ranks; say and save on the first. The patch is taken back, so that it is seen to be possible."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("failures", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shards", default="tensor", choices=("tensor", "experts", "fsdp"))
    parser.add_argument("--max-kl", type=float, default=MAX_KL)
    given = parser.parse_args()
    with lmrepair.ranks() as rank:
        net = lmrepair.load(given.model, shards=given.shards)
        failures = lmrepair.read_failures(given.failures)
        found = lmrepair.diagnose(net, net.tokenize(failures))
        made = lmrepair.repair(net, failures, gate=lmrepair.Gate(given.max_kl, tuple(read_kinds())))
        if made.patch is not None:
            made.patch.revert(net)
            made.patch.apply(net)
            made.patch.revert(net)
            if rank == 0:
                made.patch.save(given.output)
        if rank == 0:
            for before, outcome in zip(found, made.outcomes, strict=True):
                print(outcome.failure.id, f"{len(before.mistakes)} → {len(outcome.after)}", outcome.reason)
            print(f"repaired {made.repaired} of {made.failing}, KL {made.drift.kl:.5f}" if made.drift else "no patch")
    return 0 if made.repaired == made.failing else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except lmrepair.LmrepairError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
