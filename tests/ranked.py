"""What torchrun starts in tests. What takes too long says where it stands, and ends.

ranked.py example ...                 the example of shards, with its arguments
ranked.py deltas FOLDER OUTPUT        a repair of the first failure, in the folder's dtype: the change of each layer
"""

from __future__ import annotations

import faulthandler
import runpy
import sys
from pathlib import Path


def deltas(folder: str, output: str) -> None:
    """Repair, take back, apply and take back on all ranks; the first writes the change, the others nothing."""
    from oracle_models import FAILURES
    from safetensors.torch import save_file

    import lmrepair
    from lmrepair.failures import read_kinds
    from lmrepair.model import fingerprint

    with lmrepair.ranks() as rank:
        net = lmrepair.load(folder, shards="tensor")
        before = fingerprint(net, {})
        made = lmrepair.repair(net, FAILURES[:1], gate=lmrepair.Gate(float("inf"), tuple(read_kinds()))).patch
        assert made is not None
        assert made.is_applied(net)
        made.revert(net)
        assert fingerprint(net, {}) == before
        made.apply(net)
        made.revert(net)
        assert fingerprint(net, {}) == before
        if rank == 0:
            found = {str(layer): change.deltas for layer, change in made.changes.items()}
            save_file(found, output, {"body": made.fingerprint.body})


if __name__ == "__main__":
    faulthandler.dump_traceback_later(300, exit=True)
    kind = sys.argv.pop(1)
    if kind == "deltas":
        deltas(*sys.argv[1:])
    else:
        runpy.run_path(str(Path(__file__).resolve().parents[1] / "examples" / "shards.py"), run_name="__main__")
