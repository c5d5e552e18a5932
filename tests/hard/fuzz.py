"""Damaged files to every reader: nothing but our own errors, no hang, no memory beyond a bound.

    python tests/hard/fuzz.py --inputs 1000000 --memory 3

Sound files are damaged at random: bits, cuts, copies, words of the header. Two in three patches get a digest that
fits again, so that what stands behind it is reached too; in half of those it is the record that is damaged, value
by value, and stays proper JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import gguf
import numpy as np
import oracle_models
import safetensors
import torch
from factored import factored, made_up
from oracle_models import FAILURES

from lmrepair import LmrepairError, MinKl, Net, Patch, read_failures, read_reference, statistics_of
from lmrepair.model.loading.checkpoint import loading
from lmrepair.model.loading.gguf_file import open_gguf
from lmrepair.model.statistics import CachedFile
from lmrepair.patch.disk.stored import INDEX, read_checkpoint
from lmrepair.patch.format import KEY, _stamp

DEEP = 20_000  # levels of lists, more than any parser follows
WORDS = [
    *(b"0", b"-1", b"1e999", b"NaN", b"null", b"[]", b"{}", b'""', b"99999999999999999999", b'"\\ud800"', b"true"),
    *(b"[[[[", b"[" * DEEP),
]
VALUES = [word.decode() for word in WORDS if word != b"[[[["] + ['"a"', "[1]", '{"a":1}', "1.5", "1e300", "-9e18"]
VALUE = re.compile(r'"[^"]*"(?!:)|-?[0-9][0-9.e+-]*|true|false|null|\[[^][]*\]|\{[^{}]*\}')  # of the record's JSON
SLOW = 5.0  # seconds for one input
MEMORY = Path("/dev/shm")  # where files cost no disk: a file system that flushes each of them is most of the time


def damaged(raw: bytes, chance: random.Random) -> bytes:
    """The bytes with one to four things done to them."""
    data = bytearray(raw)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice([1, 2, 8, 64]))
        kind = chance.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[at:end]
        elif kind == 2:
            data[at:at] = data[at:end]
        elif kind == 3:
            data[at:end] = chance.choice(WORDS)
        elif kind == 4:
            data[at:end] = chance.randbytes(end - at)
        elif len(data) > 8:
            data[:8] = struct.pack("<Q", chance.choice([0, 1, 2**63, len(data), chance.randrange(2**32)]))
    return bytes(data)


def header_damaged(raw: bytes, chance: random.Random) -> bytes:
    """A safetensors file with its header damaged, its length right, and for a patch a digest that fits."""
    length = struct.unpack("<Q", raw[:8])[0]
    head = damaged(raw[8 : 8 + length], chance)
    made = struct.pack("<Q", len(head)) + head + raw[8 + length :]
    return stamped(made)


def stamped(raw: bytes) -> bytes:
    """A patch with a digest that fits what is in it; anything else as it is."""
    try:
        return _stamp(re.sub(rb'(digest\\?":\\?")[0-9a-f]{64}', rb"\g<1>" + b"0" * 64, raw, count=1))
    except LmrepairError:
        return raw


def record_damaged(raw: bytes, chance: random.Random) -> bytes:
    """A patch whose record is proper JSON with one to three of its values exchanged, at any depth, or gone."""
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    text: str = header["__metadata__"][KEY]
    for _ in range(chance.randint(1, 3)):
        spans = [match.span() for match in VALUE.finditer(text)]
        start, end = chance.choice(spans)
        text = text[:start] + chance.choice(VALUES) + text[end:]
    header["__metadata__"][KEY] = text
    head = json.dumps(header).encode()
    return stamped(struct.pack("<Q", len(head)) + head + raw[8 + length :])


def spoiled(kind: str, sound: bytes, chance: random.Random) -> bytes:
    """A sound file of a kind, damaged in one of the ways."""
    way = chance.randrange(3)
    if way and kind.startswith("patch"):
        return (header_damaged, record_damaged)[way - 1](sound, chance)
    if way == 1 and kind in ("shard", "statistics"):
        return header_damaged(sound, chance)
    return damaged(sound, chance)


def readers(folder: Path) -> list[tuple[str, bytes, Callable[[Path], object]]]:
    """Name, a sound file, and what reads it."""
    net = oracle_models.net()
    patch = made_up(net, FAILURES[:1], share=16)
    patches = [patch.serialise(), factored(net, patch).serialise()]
    net.model.save_pretrained(folder / "model", max_shard_size="100KB")
    shard = next((folder / "model").glob("*.safetensors"))
    rows = [
        {"prompt": "a", "target": "b\n", "id": "x", "paraphrases": ["c"]},
        {"messages": [{"role": "user", "content": "d"}], "target": "e"},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()

    def checkpoint(path: Path, name: str) -> object:
        place, sound = folder / "model" / name, (folder / "model" / name).read_bytes()
        try:
            place.write_bytes(path.read_bytes())
            return read_checkpoint(folder / "model")
        finally:
            place.write_bytes(sound)

    kept = gathered(net, folder)
    return [
        ("patch of neurons", patches[0], Patch.load),
        ("patch of factors", patches[1], Patch.load),
        ("failures", lines, read_failures),
        ("reference", b'{"text": "one"}\n{"text": "two"}\n', read_reference),
        ("shard", shard.read_bytes(), lambda path: checkpoint(path, shard.name)),
        ("index", (folder / "model" / INDEX).read_bytes(), lambda path: checkpoint(path, INDEX)),
        ("statistics", kept.path.read_bytes(), lambda path: refused_unless(replace(kept, path=path).read())),
        ("gguf", gguf_file(folder / "small.gguf"), read_gguf),
    ]


def gathered(net: Net, folder: Path) -> CachedFile:
    """The file of statistics that a model's own text gives."""
    asked = replace(MinKl().asks(), inputs="sampled", outputs="diagonal", samples=2)
    statistics_of(net, asked, cache=folder / "cache", own=1)
    (path,) = (folder / "cache").iterdir()
    with safetensors.safe_open(str(path), framework="pt") as file:
        return CachedFile(path, json.loads(file.metadata()["lmrepair"])["key"])


def refused_unless(found: object) -> object:
    """Statistics that are damaged are not refused with an error, but gathered again."""
    if found is None:
        raise LmrepairError("gathered again")
    return found


def gguf_file(path: Path) -> bytes:
    """A small GGUF file of every kind of value."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_rope_freq_base(1e4)
    writer.add_array("tokenizer.ggml.tokens", ["a", "", "ß", "</s>"])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1e30, 0.0, 1.0])
    writer.add_array("tokenizer.ggml.token_type", [1, 1, 6, 3])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    for name, rows in (("token_embd.weight", 4), ("blk.0.ffn_down.weight", 32)):
        values = np.ones((rows, 32), dtype=np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def read_gguf(path: Path) -> object:
    """The header, as far as it is checked, and then all that gguf's reader makes of it, as ``load`` asks it."""
    with loading(str(path)):
        return [tensor.data.sum() for tensor in open_gguf(path).tensors]


def main() -> None:
    """Read as many damaged files as asked, and say what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many, whatever is left")
    parser.add_argument("--memory", type=float, default=3.0, help="GB of memory that the process may have, in all")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    torch.set_num_threads(1)
    found: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name:
        known = readers(Path(name))
        limit = int(given.memory * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        path = Path(name) / "input.safetensors"
        began = time.perf_counter()
        for at in range(given.inputs):
            if time.perf_counter() - began > 60 * given.minutes:
                break
            kind, sound, read = known[at % len(known)]
            raw = spoiled(kind, sound, chance)
            path.write_bytes(raw)
            start = time.perf_counter()
            try:
                read(path)
                found[f"{kind}: read"] += 1
            except LmrepairError:
                found[f"{kind}: refused"] += 1
            except BaseException as error:  # noqa: BLE001 (that is what is looked for)
                Path("fuzz.failed").write_bytes(raw)
                sys.exit(f"input {at} ({kind}, kept as fuzz.failed): {type(error).__name__}: {str(error)[:300]}")
            slowest = max(slowest, time.perf_counter() - start)
            if slowest > SLOW:
                Path("fuzz.failed").write_bytes(raw)
                sys.exit(f"input {at} ({kind}, kept as fuzz.failed) took {slowest:.1f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{sum(found.values())} inputs, slowest {slowest:.3f} s, peak {peak:.2f} GB: {dict(sorted(found.items()))}")


if __name__ == "__main__":
    main()
