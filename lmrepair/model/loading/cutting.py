"""A model in shards, on the processes (ranks) that torchrun started: transformers cuts it, all run the same code."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as distributed
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.distributed.configuration_utils import DistributedConfig

from lmrepair.errors import ModelError, UsageError, nearest

SHARDS = ("tensor", "experts", "fsdp")
PATIENCE = timedelta(minutes=10)  # that a rank waits for the others before it gives up


@contextmanager
def ranks(patience: timedelta = PATIENCE) -> Iterator[int]:
    """Work as one of the processes that torchrun started, for the length of a block; gives this one's number.

    All leave the block together. A process that ends with its group still standing may wait for ever for threads
    that wait for other processes, so the group is taken down whatever happens. Raises UsageError outside torchrun.
    """
    if "RANK" not in os.environ:
        raise UsageError("not one of several ranks; start it as torchrun --nproc-per-node N SCRIPT")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(backend, timeout=patience)
    try:
        yield distributed.get_rank()
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def cut(source: str, config: Any, shards: str) -> DistributedConfig:
    """How a model is cut for the ranks there are: "tensor", "experts" where these stay whole and are dealt out, or
    "fsdp": each weight by its first dimension, to be put together where its block runs.

    Raises UsageError outside of ``ranks``, ModelError for what cannot be cut evenly or has no plan for it.
    """
    if shards not in SHARDS:
        raise UsageError(f"unknown shards {shards!r}; {nearest(shards, SHARDS)}")
    if not distributed.is_initialized():
        raise UsageError(f"shards {shards!r} need the ranks that torchrun starts; load inside of lmrepair.ranks()")
    size, text = distributed.get_world_size(), config.get_text_config()
    if shards == "fsdp":
        return DistributedConfig(fsdp_size=size)  # of any number of ranks, unevenly if need be
    heads = text.num_attention_heads
    counts = {
        "attention heads": heads,
        "key and value heads": getattr(text, "num_key_value_heads", None) or heads,
    }
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    if shards == "experts":
        plan = getattr(text, "base_model_ep_plan", None) if experts else None
        counts["experts"] = experts or 0
    else:
        plan = getattr(text, "base_model_tp_plan", None) if not experts else None
        counts["neurons of a layer"] = getattr(text, "intermediate_size", None) or size
    if not plan:
        other = "experts of a mixture" if shards == "tensor" and experts else "transformers has no plan for it"
        advice = 'load it with shards "experts"' if shards == "tensor" and experts else "load it whole"
        raise ModelError(f"{source}: cannot be cut into shards {shards!r} ({other}); {advice}")
    for name, count in counts.items():
        if count % size:
            most = math.gcd(*counts.values())
            fitting = ", ".join(str(number) for number in range(1, most + 1) if most % number == 0)
            raise ModelError(
                f"{source}: {size} ranks do not divide the model's {count} {name}; expected one of {fitting} "
                "(torchrun --nproc-per-node)"
            )
    extra: dict[str, Any] = {"ep_size": size, "ep_implementation": "all_reduce"} if shards == "experts" else {}
    return DistributedConfig(tp_size=size, tp_plan="auto", **extra)


def refuse_uncut(source: str, model: nn.Module, plan: DistributedConfig) -> None:
    """Raise ModelError for blocks that are not put together one by one: transformers' plan calls them otherwise."""
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    if plan.dp_size > 1 and not any(isinstance(block, FSDPModule) for blocks in lists for block in blocks):
        raise ModelError(
            f'{source}: cannot be cut into shards "fsdp" (transformers has no plan for its blocks, so that every rank '
            "would put the whole model together at once); load it whole, or wrap its blocks with fully_shard and hand "
            "the model over"
        )
