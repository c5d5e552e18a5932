"""A disk that is full at any byte, by a limit on the size of files: all that writes, and what it leaves behind."""

from __future__ import annotations

import random
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from factored import digests, factored, made_up
from oracle_models import FAILURES

from lmrepair import LmrepairError, Net
from lmrepair.model import quietly
from lmrepair.patch import Modules, Writing, exact, rewrite, save_gguf, save_model, save_peft

COPY = Writing(link=False, force=True)
LOWEST = 8  # limits of so many bytes are tried first


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """What a full disk does to whoever writes on, for this process alone."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@dataclass(frozen=True)
class Writes:
    """Something that writes below ``folder``: what it is called, and how it is started."""

    name: str
    folder: Path
    start: Callable[[], object]


def all_writes(room: Path, net: Net) -> list[Writes]:
    """Each with a folder of its own, in which its source or an earlier output stands."""
    patch = made_up(net, FAILURES[:1])
    whole = factored(net, patch)
    adapter = exact(whole, dict(enumerate(net.widths)))
    found = []

    def add(name: str, start: Callable[[Path], object], shards: str | None = None) -> None:
        folder = room / name.replace(" ", "-")
        folder.mkdir()
        if shards:
            net.model.save_pretrained(folder / "model", max_shard_size=shards)
        found.append(Writes(name, folder, lambda: start(folder)))

    for kind, shards in (("one shard", "1GB"), ("many shards", "20KB")):
        add(f"apply over an output, {kind}", lambda at: rewrite(at / "model", patch, False, at / "new", COPY), shards)
        add(f"apply in place, {kind}", lambda at: rewrite(at / "model", patch, False, None, COPY), shards)
    add("patch of neurons", lambda at: patch.save(at / "p.safetensors"))
    add("patch of factors", lambda at: whole.save(at / "p.safetensors"))
    add("peft", lambda at: save_peft(adapter, Modules.of(net), at / "adapter", force=True))
    add("gguf", lambda at: save_gguf(adapter, "llama", at / "adapter.gguf", force=True))
    add("merged", lambda at: save_model(net, at / "merged"))
    return found


def tried_full(writes: Writes, limits: int, chance: random.Random) -> Counter[str]:
    """Written at so many limits below the size of the largest file it writes, and what became of it.

    Raises AssertionError where something that was refused is not as it was, or something cut was left as written.
    """
    before = digests(writes.folder)
    kept = {path: path.read_bytes() for path in writes.folder.rglob("*") if path.is_file()}
    with quietly():
        writes.start()
    whole = digests(writes.folder)
    largest = max(path.stat().st_size for path in writes.folder.rglob("*") if path.is_file())
    found: Counter[str] = Counter()
    for at in range(limits):
        restore(writes.folder, kept)
        assert digests(writes.folder) == before
        size = at if at < LOWEST else chance.randrange(largest)
        said = refusal(writes, size)
        wanted = before if said else whole  # where all that is written anew is below the limit
        assert digests(writes.folder) == wanted, f"{size} bytes, and not as it should be: {said or 'written'}"
        assert "\n" not in said
        found["refused" if said else "written"] += 1
    restore(writes.folder, kept)
    return found


def refusal(writes: Writes, size: int) -> str:
    """What is said where no file may be larger; nothing where it is written."""
    try:
        with no_file_larger_than(size), quietly():
            writes.start()
    except (LmrepairError, OSError) as error:
        return str(error)
    return ""


def restore(folder: Path, kept: dict[Path, bytes]) -> None:
    """The files of a folder as they were, and nothing else."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file() and path not in kept:
            path.unlink()
        elif path.is_dir() and not any(one.is_relative_to(path) for one in kept):
            path.rmdir()
    for path, raw in kept.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
