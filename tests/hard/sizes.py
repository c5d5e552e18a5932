"""A made checkpoint of many gigabytes, patched on the disk: peak memory and processor time.

    python tests/hard/sizes.py --gigabytes 16

The tensors are holes in sparse files but for the patched columns, so that the disk need not have the room.
"""

from __future__ import annotations

import argparse
import json
import resource
import struct
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from lmrepair import Patch
from lmrepair.failures import Tokens
from lmrepair.model import Change, Fingerprint
from lmrepair.patch import Item, Made, rewrite
from lmrepair.patch.disk.placing import Placed, digest_without
from lmrepair.patch.disk.stored import INDEX, read_checkpoint

BUILD = Path("build")  # on a disk, and of no interest to git, which would read holes as bytes
HIDDEN, WIDTH, A_SHARD = 4096, 14336, 4  # as in models of seven billion weights; layers in one shard


def write_checkpoint(folder: Path, layers: int) -> None:
    """Shards of bfloat16 tensors of zeros, as holes, with the shapes of a Llama's blocks."""
    shapes = {
        "mlp.down_proj": (HIDDEN, WIDTH), "mlp.gate_proj": (WIDTH, HIDDEN), "mlp.up_proj": (WIDTH, HIDDEN),
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
    }  # fmt: skip
    weight_map = {}
    for number, first in enumerate(range(0, layers, A_SHARD)):
        header, end = {}, 0
        for layer in range(first, min(layers, first + A_SHARD)):
            for name, shape in shapes.items():
                size = 2 * shape[0] * shape[1]
                header[f"model.layers.{layer}.{name}.weight"] = {
                    "dtype": "BF16", "shape": shape, "data_offsets": [end, end + size],
                }  # fmt: skip
                end += size
        file = f"model-{number + 1:05}-of-{-(-layers // A_SHARD):05}.safetensors"
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as opened:
            opened.write(struct.pack("<Q", len(text)) + text)
            for layer in range(first, min(layers, first + A_SHARD)):  # one row that tells the layers apart
                start, _ = header[f"model.layers.{layer}.mlp.down_proj.weight"]["data_offsets"]
                opened.seek(8 + len(text) + start)
                opened.write(
                    torch.randn(WIDTH, generator=torch.Generator().manual_seed(layer))
                    .bfloat16()
                    .view(torch.uint8)
                    .numpy()
                    .tobytes()
                )
            opened.truncate(8 + len(text) + end)
        weight_map |= dict.fromkeys(header, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    (folder / "config.json").write_text("{}", encoding="utf-8")


def make_patch(folder: Path, layers: int, changed: int) -> Patch:
    """Sixteen neurons in each of the last layers."""
    checkpoint = read_checkpoint(folder)
    columns = torch.arange(0, 160, 10)
    changes, digests = {}, []
    for layer in range(layers):
        neurons = Placed(checkpoint.tensors[f"model.layers.{layer}.mlp.down_proj.weight"], False).read()
        left = columns if layer >= layers - changed else torch.zeros(0, dtype=torch.int64)
        if len(left):
            changes[layer] = Change(columns, torch.full((16, HIDDEN), 0.01), neurons[columns].contiguous())
        digests.append(digest_without(neurons, left))
    item = Item(Tokens("one", (1,), (2,)), "a", "b", True, (), ())
    made = Made("made", "star", {}, {}, {})
    return Patch(changes, (item,), made, Fingerprint("0" * 64, tuple(digests)))


def main() -> None:
    """Make the checkpoint, patch it, take it back, and say what that took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=16.0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    layer_bytes = 2 * (3 * HIDDEN * WIDTH + 2 * HIDDEN * HIDDEN)
    layers = max(1, round(given.gigabytes * 1e9 / layer_bytes))
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as name:
        folder = Path(name)
        (folder / "old").mkdir()
        write_checkpoint(folder / "old", layers)
        patch = make_patch(folder / "old", layers, min(4, layers))
        size = sum(path.stat().st_size for path in (folder / "old").iterdir())
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        start, used = time.perf_counter(), time.process_time()
        rewrite(folder / "old", patch, False, folder / "new")
        seconds, processor = time.perf_counter() - start, time.process_time() - used
        rewrite(folder / "new", patch, True, folder / "back")
        for path in (folder / "old").iterdir():
            back = folder / "back" / path.name
            if not back.samefile(path):
                with path.open("rb") as one, back.open("rb") as other:
                    while part := one.read(1 << 26):
                        assert part == other.read(1 << 26), path.name
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    largest = 2 * HIDDEN * WIDTH / 1e9
    print(
        f"{size / 1e9:.1f} GB, {layers} layers: applied in {seconds:.0f} s ({processor:.0f} s of processor), "
        f"peak {peak:.2f} GB (before {before:.2f}; largest tensor {largest:.2f}), taken back to the byte"
    )


if __name__ == "__main__":
    main()
