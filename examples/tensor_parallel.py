"""A repair of a model that lies on several devices as shards, one process for each (tensor parallel).

    torchrun --nproc-per-node 2 examples/tensor_parallel.py failures.jsonl --model my/model --output fix.safetensors
    lmrepair verify fix.safetensors --model my/model

Attention and the matrices that feed an FFN are cut; the FFN output projections, which a repair writes to, and the
head are whole on every rank. So every rank solves for the same change, and the first one writes the patch, which is
that of one process: the second command checks it there. The plan is for models of the Llama type; for another
one, name its matrices in PLAN.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as ranks
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

from lmrepair import Gate, ModelError, Net, read_failures, repair
from lmrepair.failures import MAX_KL, read_kinds

PLAN = {
    "model.layers.*.mlp.gate_proj": "colwise_gather_output",
    "model.layers.*.mlp.up_proj": "colwise_gather_output",
    "model.layers.*.mlp.down_proj": "replicate",
    "lm_head": "replicate",
}


def refuse_uneven(config: Any, size: int) -> None:
    """Raise ModelError for a number of ranks that does not divide the model's heads, before anything is loaded."""
    text = config.get_text_config()
    heads = {
        "attention heads": text.num_attention_heads,
        "key and value heads": getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
    }
    most = math.gcd(*heads.values())
    fitting = [str(number) for number in range(1, most + 1) if most % number == 0]
    for name, count in heads.items():
        if count % size:
            raise ModelError(
                f"{size} ranks do not divide the model's {count} {name}; expected one of {', '.join(fitting)} "
                "(torchrun --nproc-per-node)"
            )


def load(folder: str, size: int) -> Net:
    """The model in shards, placed and proved as any other."""
    refuse_uneven(AutoConfig.from_pretrained(folder), size)
    settings = DistributedConfig(tp_size=size, tp_plan=PLAN)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, distributed_config=settings, use_safetensors=True)
    return Net(model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(folder), Path(folder).name)


def main() -> None:
    """Repair on all ranks; say and save on the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("failures", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max-kl", type=float, default=MAX_KL)
    given = parser.parse_args()
    ranks.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    first = ranks.get_rank() == 0
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.manual_seed(0)  # all ranks have to draw the same
    net = load(given.model, ranks.get_world_size())
    made = repair(net, read_failures(given.failures), gate=Gate(given.max_kl, tuple(read_kinds())))
    if first:
        for outcome in made.outcomes:
            print(outcome.failure.id, f"{len(outcome.before)} → {len(outcome.after)}", outcome.reason)
        print(f"repaired {made.repaired} of {made.failing}", f"KL {made.drift.kl:.5f}" if made.drift else "")
    if made.patch is not None:
        if first:
            made.patch.save(given.output)
        made.patch.revert(net)
    ranks.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes wait for one another when Python ends


if __name__ == "__main__":
    main()
