"""What torchrun starts in tests. What takes too long says where it stands, and ends.

ranked.py example ...                    the example of shards, with its arguments
ranked.py deltas FOLDER OUTPUT KIND...   repairs of the first failure by METHODS, in the folder's dtype: the change of
                                         each layer. KIND: shards that the folder is loaded in, or one of WRAPPED
"""

from __future__ import annotations

import faulthandler
import runpy
import sys
from pathlib import Path
from typing import Any

import mixtures
import oracle_models
import pytest
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard

import lmrepair
from lmrepair.errors import NotFiniteError
from lmrepair.failures import read_kinds
from lmrepair.model import fingerprint
from lmrepair.model.anatomy import here

METHODS: dict[str, lmrepair.Method] = {
    "minkl": lmrepair.MinKl(),
    "star": oracle_models.bold_star(learning_rate=0.1, epochs=200, share="1"),
    "finetune": lmrepair.FineTune(learning_rate=0.01, max_probe_kl=float("inf")),
}


def by_blocks() -> Any:
    """A mixture whose blocks are put together one by one."""
    model = mixtures.model("mixtral")
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def at_once() -> Any:
    """A model in training whose weights are all put together at its first part, and stay so behind the last."""
    return fully_shard(oracle_models.model().requires_grad_(True).train())


WRAPPED = {"by blocks": by_blocks, "at once": at_once}


def repaired(net: lmrepair.Net, name: str) -> lmrepair.Patch:
    """The patch of the first failure, which is taken back, applied, and taken back."""
    gate = lmrepair.Gate(float("inf"), tuple(read_kinds()))
    made = lmrepair.repair(net, oracle_models.FAILURES[:1], METHODS[name], gate=gate)
    assert made.patch is not None
    assert made.repaired == 1
    made.patch.revert(net)
    made.patch.apply(net)
    made.patch.revert(net)
    return made.patch


def break_off(net: lmrepair.Net) -> None:
    """A pass that ends midway, because a weight that is put back afterwards is no number."""
    place = net.anatomy.ffns[0]
    columns = net.every_site().columns[0]
    kept = place.take(columns)
    place.put(columns, kept * float("nan"))
    with pytest.raises(NotFiniteError):
        net.generate(net.tokenize(oracle_models.FAILURES[:1]))
    place.put(columns, kept)


def deltas(folder: str, output: str, *kinds: str) -> None:
    """Repair on all ranks; the first writes the changes, the others nothing."""
    found, bodies = {}, {}
    with lmrepair.ranks() as rank:
        for kind in kinds:
            if kind in WRAPPED:
                net = lmrepair.load(WRAPPED[kind](), oracle_models.tokenizer())
            else:
                net = lmrepair.load(folder, shards=kind)
            assert sum(here(one).numel() for one in net.model.parameters()) < 0.7 * sum(
                one.numel() for one in net.model.parameters()
            )
            before = fingerprint(net, {})
            break_off(net)
            assert fingerprint(net, {}) == before
            for name in METHODS if kind not in WRAPPED else ("minkl",):
                patch = repaired(net, name)
                assert fingerprint(net, {}) == before
                bodies[kind] = patch.fingerprint.body
                found |= {f"{kind} {name} {layer}": change.deltas for layer, change in patch.changes.items()}
        if rank == 0:
            save_file(found, output, bodies)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(300, exit=True)
    kind = sys.argv.pop(1)
    if kind == "deltas":
        deltas(*sys.argv[1:])
    else:
        runpy.run_path(str(Path(__file__).resolve().parents[1] / "examples" / "shards.py"), run_name="__main__")
