"""What quantisation leaves of a patch's repairs, asked of llama.cpp itself.

    python benchmarks/served.py fix.safetensors model.gguf --output served.json

Four ways to serve the same patch: the base as it is; the base with the patch as a LoRA; and the patched FFN
output projections written back into the GGUF, in 8 and in 4 bits, all other tensors as they are.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import gguf
import torch

from lmrepair import Patch
from lmrepair.patch import exact, holding, llama_cpp, read_base, save_gguf

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
    right = [True] * len(tokens)
    counts = {"base": holding(patch, 0, right, llama_cpp(given.base, None, tokens))}
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter.gguf"
        save_gguf(factors, found.architecture, adapter)
        counts["adapter"] = holding(patch, 0, right, llama_cpp(given.base, adapter, tokens))
        changes = {f"blk.{layer}.ffn_down.weight": b @ a for layer, (a, b) in factors.layers.items()}
        for form in FORMS:
            place = Path(folder) / f"{form}.gguf"
            merged(given.base, changes, form, place)
            counts[f"merged {form}"] = holding(patch, 0, right, llama_cpp(place, None, tokens))
    record = {
        "patch": given.patch.name, "base": given.base.name, "model": patch.made.model, "method": patch.made.method,
        "settings": dict(patch.made.settings), "rank": factors.rank, "adapter_bytes": factors.bytes,
        "holds": {way: {"kept": held.kept, "of": held.claimed, "lost": held.lost} for way, held in counts.items()},
    }  # fmt: skip
    text = json.dumps(record, indent=1, sort_keys=True)
    if given.output:
        given.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
