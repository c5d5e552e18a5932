"""Every class of transformers' causal-LM mapping, tiny and random: placed or refused, repaired, taken back.

    python benchmarks/census/census.py                 # all, two at a time: the record and the table in docs/models.md
    python benchmarks/census/census.py llama mixtral   # some of them, on standard output

Each class runs in a process that others may have run in before; one that dies, or takes longer than ``--limit``
seconds, is replaced, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECORD = ROOT / "benchmarks" / "results" / "census.json"
PAGE = ROOT / "docs" / "models.md"
LIMIT = 60.0  # seconds for one class
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def serve() -> None:
    """The other end: a model type a line in, facts as JSON lines out, an empty line where there are no more."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is none of it
    import transformers
    from trial import trial

    transformers.logging.set_verbosity_error()
    for line in sys.stdin:
        for fact in trial(line.strip()):
            print(json.dumps(fact), file=out, flush=True)
        print(file=out, flush=True)


class Worker:
    """A process that tries one class after another, and another one in its place where it dies."""

    def __init__(self, cache: str, limit: float) -> None:
        self.environment = {**os.environ, **QUIET, "LMREPAIR_CACHE": cache}
        self.limit = limit
        self.child: subprocess.Popen[str] | None = None
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115

    def tried(self, kind: str) -> dict[str, Any]:
        """The facts of one class; ``error`` where its process did not come to an end of them."""
        if self.child is None or self.child.poll() is not None:
            self.said.seek(0)
            self.said.truncate()
            command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
            self.child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.said,
                text=True,
                env=self.environment,
            )
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        found: dict[str, Any] = {"kind": kind}
        began = time.monotonic()
        with after(self.limit, self.child.kill):
            print(kind, file=self.child.stdin, flush=True)
            for line in self.child.stdout:
                if line == "\n":
                    return found
                found |= json.loads(line)
        self.child.wait()
        late = time.monotonic() - began >= self.limit
        return found | {"error": f"no end after {self.limit:g} seconds" if late else self.last_words()}

    def last_words(self) -> str:
        """The last line that the process wrote to standard error: of a traceback, the error."""
        self.said.seek(0)
        lines = [line.strip() for line in self.said.read().splitlines() if line.strip()]
        return lines[-1][:300] if lines else "the process died without a word"

    def close(self) -> None:
        if self.child is not None and self.child.stdin is not None:
            self.child.stdin.close()
            self.child.wait()
        self.said.close()


@contextmanager
def after(seconds: float, act: Any) -> Iterator[None]:
    """Act unless the block ends before."""
    timer = threading.Timer(seconds, act)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def census(kinds: Sequence[str], jobs: int, limit: float, say: Any) -> list[dict[str, Any]]:
    """The facts of every class, in the order of the kinds."""
    waiting: SimpleQueue[str] = SimpleQueue()
    for kind in kinds:
        waiting.put(kind)
    found: dict[str, dict[str, Any]] = {}

    def work(cache: str) -> None:
        worker = Worker(cache, limit)
        try:
            while True:
                kind = waiting.get_nowait()
                found[kind] = worker.tried(kind)
                say(f"{len(found)} of {len(kinds)}: {kind}")
        except Empty:
            worker.close()

    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(work, cache) for _ in range(jobs)]:
            done.result()
    return [found[kind] for kind in kinds]


def main() -> None:
    """Run the census, or a part of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="model types; left out: all of the mapping, and the page is written")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for one class")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve()
        return
    from table import record, table, written
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    began = time.monotonic()
    kinds = given.kinds or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    rows = census(kinds, given.jobs, given.limit, lambda line: print(line, file=sys.stderr, flush=True))
    data = record(rows, time.monotonic() - began)
    if given.kinds:
        print(json.dumps(data, indent=1))
        return
    RECORD.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), table(data)), encoding="utf-8")
    print(json.dumps(data["counts"], indent=1))


if __name__ == "__main__":
    main()
