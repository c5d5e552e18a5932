"""What serving leaves of a patch's repairs, asked of llama.cpp and PEFT themselves.

    python benchmarks/served.py fix.safetensors model.gguf --output served.json

Ways to serve the same patch: the base with the patch as a LoRA; and the patched FFN output projections written back
into the GGUF, in 8 and in 4 bits, all other tensors as they are. Beside them the base as it is, and PEFT on the floats.
How far an engine's numbers are from the patched model's: the log-probabilities of what it writes, compared token by
token (llama.cpp), and all logits at the targets (PEFT).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import gguf
import torch

from lmrepair import Net, Patch, load
from lmrepair.failures import Tokens
from lmrepair.model import settled
from lmrepair.patch import (
    Factors,
    Modules,
    answers,
    exact,
    held_by_llama_cpp,
    held_whole,
    holding,
    llama_tokens,
    peft_on,
    read_base,
    save_gguf,
    save_peft,
)

FORMS = ("Q8_0", "Q4_0")


def merged(base: Path, changes: dict[str, torch.Tensor], form: str, output: Path) -> None:
    """A copy of a GGUF with the changes [d, m] added to the tensors named, and those stored in another form."""
    reader = gguf.GGUFReader(base)
    writer = gguf.GGUFWriter(output, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    kind = getattr(gguf.GGMLQuantizationType, form)
    for tensor in reader.tensors:
        data, stored = tensor.data, tensor.tensor_type
        if tensor.name in changes:
            values = torch.from_numpy(gguf.dequantize(data, stored).copy()).float() + changes[tensor.name]
            data, stored = gguf.quantize(values.numpy(), kind), kind
        writer.add_tensor(tensor.name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def log_probabilities(net: Net, tokens: Sequence[Tokens]) -> list[torch.Tensor]:
    """Of each item's target tokens, as the net gives them, [target]."""
    found = []
    with torch.inference_mode(), settled(net.model):
        for item in tokens:
            (batch,) = net.batches([item])
            found.append(net.logits(batch).float().log_softmax(dim=1).gather(1, batch.wanted[:, None]).squeeze(1))
    return found


def apart(net: Net, base: Path, adapter: Path | None, tokens: Sequence[Tokens]) -> dict[str, float]:
    """How far llama.cpp's log-probabilities of what it writes are from the net's, in nats."""
    written = llama_tokens(base, adapter, tokens)
    same = [replace(item, target=tuple(token for token, _ in one)) for item, one in zip(tokens, written, strict=True)]
    gaps = [
        abs(float(mine) - its)
        for ours, one in zip(log_probabilities(net, same), written, strict=True)
        for mine, (_, its) in zip(ours, one, strict=True)
    ]
    return {"tokens": len(gaps), "mean": fmean(gaps), "most": max(gaps)}


def by_peft(net: Net, patch: Patch, factors: Factors, folder: Path) -> dict[str, Any]:
    """Repairs that hold in PEFT, and how far its logits at the targets are from the patched model's."""
    tokens = [item.tokens for item in patch.items]

    def logits() -> torch.Tensor:
        with torch.inference_mode(), settled(net.model):
            return torch.cat([net.logits(batch).float() for batch in net.batches(tokens)])

    save_peft(factors, Modules.of(net), folder)
    with patch.on(net):
        wanted = logits()
    with peft_on(net, folder):
        gap, held = (logits() - wanted).abs(), holding(patch, 0, *answers(net, patch))
    return {"kept": held.kept, "of": held.claimed, "logits_most": float(gap.max()), "logits_mean": float(gap.mean())}


def main() -> None:
    """Ask llama.cpp for every failure's greedy text in each of the ways, and count what holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patch", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    patch = Patch.load(given.patch)
    found = read_base(given.base, patch)
    factors = exact(patch, found.widths)
    tokens = [item.tokens for item in patch.items]
    net = load(str(given.base))
    counts = {"floats": held_whole(net, patch), "base": held_by_llama_cpp(patch, given.base, None)}
    gaps = {"base": apart(net, given.base, None, tokens)}
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter.gguf"
        save_gguf(factors, found.architecture, adapter)
        peft = by_peft(net, patch, factors, Path(folder) / "peft")
        counts["adapter"] = held_by_llama_cpp(patch, given.base, adapter)
        changes = {f"blk.{layer}.ffn_down.weight": b @ a for layer, (a, b) in factors.layers.items()}
        for form in FORMS:
            place = Path(folder) / f"{form}.gguf"
            merged(given.base, changes, form, place)
            counts[f"merged {form}"] = held_by_llama_cpp(patch, place, None)
        with patch.on(net):
            gaps["adapter"] = apart(net, given.base, adapter, tokens)
    record = {
        "patch": given.patch.name, "base": given.base.name, "model": patch.made.model, "method": patch.made.method,
        "settings": dict(patch.made.settings), "rank": factors.rank, "adapter_bytes": factors.bytes,
        "form": net.source.form, "peft": peft, "log_probability": gaps,
        "holds": {way: {"kept": held.kept, "of": held.claimed, "lost": held.lost} for way, held in counts.items()},
    }  # fmt: skip
    text = json.dumps(record, indent=1, sort_keys=True)
    if given.output:
        given.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
