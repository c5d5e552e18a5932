"""``kill -9`` at random moments of apply and revert on the disk: what is found must be the old folder or the new one.

python tests/hard/kills.py --kills 1000
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import oracle_models
import torch
from factored import made_up
from oracle_models import FAILURES

from lmrepair import Patch
from lmrepair.patch import Writing, rewrite, save_model


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def work(folder: Path, patch: Patch, place: str) -> None:
    """Apply and revert for ever, in place or over an output that is replaced."""
    torch.set_num_threads(1)
    while True:
        for revert in (False, True):
            try:
                if place == "in place":
                    rewrite(folder / "model", patch, revert, None)
                else:
                    source = folder / ("new" if revert else "old")
                    rewrite(source, patch, revert, folder / "model", Writing(force=True))
            except Exception as error:  # noqa: BLE001 (a child that dies of itself would look like one that was killed)
                (folder / "error").write_text(repr(error), encoding="utf-8")
                os._exit(1)


def let_run(child: int, span: float) -> None:
    """Wait until a child has had ``span`` seconds of a processor, however busy the machine is."""
    place = Path(f"/proc/{child}/schedstat")
    while int(place.read_text(encoding="ascii").split()[0]) < span * 1e9:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return  # by itself
        time.sleep(0.0005)


def main() -> None:
    """Kill as often as asked, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    net = oracle_models.net("llama", dtype=torch.bfloat16)
    patch = made_up(net, FAILURES[:1])
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.shards == 1:
            save_model(net, folder / "old")
        else:
            net.model.save_pretrained(folder / "old", max_shard_size="20KB")
        rewrite(folder / "old", patch, False, folder / "new")
        start = time.process_time()
        for revert in (False, True):  # how long a child needs to be somewhere in its work, on this machine and now
            rewrite(folder / ("new" if revert else "old"), patch, revert, folder / "model", Writing(force=True))
        span = (time.process_time() - start) / 2
        known = {digest(folder / "old"): "old", digest(folder / "new"): "new"}
        for at in range(given.kills):
            place = "in place" if at % 2 else "output"
            if not (folder / "model").exists():
                rewrite(folder / "new", patch, True, folder / "model")
            elif place == "in place" and known[digest(folder / "model")] == "new":
                rewrite(folder / "model", patch, True, None)
            child = os.fork()
            if child == 0:
                work(folder, patch, place)
            let_run(child, chance.uniform(0.0, 3 * span))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            if (folder / "error").exists():
                sys.exit(f"the child failed by itself: {(folder / 'error').read_text(encoding='utf-8')}")
            found[f"{place}: {known.get(digest(folder / 'model'), 'NEITHER')}"] += 1
            if "NEITHER" in " ".join(found):
                sys.exit(f"kill {at}: {folder} holds neither the old state nor the new one")
        left = len(list(folder.glob(".*")))
    print(
        f"{given.kills} kills, {given.shards} shards: {dict(sorted(found.items()))}; {left} hidden folders left behind"
    )


if __name__ == "__main__":
    main()
