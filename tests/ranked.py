"""Work for several ranks in tests, each a fork of the test's process: to import torch and transformers anew for each
takes longer than all of it. What takes too long says where it stands, and ends.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mixtures
import oracle_models
import pytest
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard

import lmrepair
from lmrepair.errors import NotFiniteError
from lmrepair.model import fingerprint
from lmrepair.model.anatomy import here

PATIENCE = 300  # seconds, on a machine that does much else
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


OWN = 24  # texts that a model writes for its statistics here
WRAPPED = {"by blocks": by_blocks, "at once": at_once}


def known(net: lmrepair.Net, name: str, cache: Path | None = None) -> lmrepair.Statistics | None:
    """The statistics that a method asks for, from a few texts."""
    asked = METHODS[name].asks()
    return None if asked is None else lmrepair.statistics_of(net, asked, own=OWN, cache=cache)


def repaired(net: lmrepair.Net, name: str, cache: Path | None = None) -> lmrepair.Patch:
    """The patch of the first failure, which is taken back, applied, and taken back."""
    method, gate = METHODS[name], lmrepair.Gate(float("inf"), (oracle_models.TEXT,))
    made = lmrepair.repair(
        net,
        oracle_models.FAILURES[:1],
        method,
        oracle_models.TEXT,
        statistics=known(net, name, cache),
        gate=gate,
    )
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


def deltas(folder: Path, output: Path, *kinds: str) -> None:
    """Repairs of the first failure by METHODS on all ranks, in the folder's dtype; the first rank writes the change of
    each layer, the others nothing. A kind is shards that the model of that name in the folder is loaded in, or one of
    WRAPPED.
    """
    found, bodies = {}, {}
    with lmrepair.ranks() as rank:
        for kind in kinds:
            if kind in WRAPPED:
                net = lmrepair.load(WRAPPED[kind](), oracle_models.tokenizer())
            else:
                net = lmrepair.load(str(folder / kind), shards=kind)
            assert sum(here(one).numel() for one in net.model.parameters()) < 0.7 * sum(
                one.numel() for one in net.model.parameters()
            )
            before = fingerprint(net, {})
            break_off(net)
            assert fingerprint(net, {}) == before
            for name in METHODS if kind in ("tensor", "fsdp") else ("minkl",):
                patch = repaired(net, name)
                assert fingerprint(net, {}) == before
                bodies[kind] = patch.fingerprint.body
                found |= {f"{kind} {name} {layer}": change.deltas for layer, change in patch.changes.items()}
        if rank == 0:
            save_file(found, output, bodies)


def on_ranks(size: int, cache: Path, said: Path, work: Callable[..., object], *arguments: object) -> None:
    """Call ``work`` on so many ranks, as torchrun would; all have to come back. What they write goes to ``said``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    forks = []
    for rank in range(size):
        forks.append(os.fork())
        if not forks[-1]:
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LMREPAIR_CACHE": str(cache)}
            os.environ.update(group | own)
            _as_a_rank(said, work, arguments)
    codes = [os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) for fork in forks]
    assert codes == [0] * size, said.read_text(encoding="utf-8")


def _as_a_rank(said: Path, work: Callable[..., object], arguments: tuple[object, ...]) -> None:
    """Do the work and end, without what the test's process would do at its end; all that is said goes to a file."""
    code = 1
    with said.open("a", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        faulthandler.dump_traceback_later(PATIENCE, exit=True, file=file)
        try:
            work(*arguments)
            code = 0
        finally:
            if code:
                traceback.print_exc(file=file)
                file.flush()
            os._exit(code)
