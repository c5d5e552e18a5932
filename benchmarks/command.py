"""What a user waits for: the whole command that repairs one failure, part by part, in processes of their own.

    python benchmarks/command.py MODEL ROWS --template '# {prompt}\\n{target}\\n' --output command.json

The first row of ROWS that fails is repaired at first use (an empty cache), then --runs times with the statistics
there, then beside a process that spins and beside one whose matrix products keep two threads busy. All in one run on
one machine, which should have nothing else to do. Memory is the peak of the process less what a process holds that has
loaded the model and does nothing more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lmrepair.bench.machine import machine, versions

SPINNING = "while True: pass"
PRODUCTS = "import torch; torch.set_num_threads(2); a = torch.randn(2000, 2000)\nwhile True: a @ a"
LOADED = """import sys, lmrepair
from lmrepair.model import keep_blocks_apart
keep_blocks_apart()
net = lmrepair.load(sys.argv[1])
pages = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS")]
print(net.bytes, 1024 * int(pages[0]))
"""
SETTLING = 4.0  # seconds until a process beside is at its work


def ran(arguments: Sequence[str], cache: Path) -> tuple[float, int, str]:
    """Seconds, peak memory in bytes and standard output of a Python process. Raises SystemExit where it fails."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=output, stderr=subprocess.DEVNULL,
            env={**os.environ, "LMREPAIR_CACHE": str(cache)},
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - began
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit status {process.returncode}")
    return seconds, usage.ru_maxrss * 1024, text


@contextmanager
def beside(code: str) -> Iterator[None]:
    """Another process at work."""
    process = subprocess.Popen([sys.executable, "-c", code])
    time.sleep(SETTLING)
    try:
        yield
    finally:
        process.kill()
        process.wait()


class Command:
    """The command on one failure, with a cache of its own; every run's record is checked for a repair."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.folder = folder
        self.arguments = [
            "-m", "lmrepair", "repair", given.rows, "--model", given.model, "--template", given.template,
            "--failing", "1", "--output", str(folder / "patch.safetensors"), "--json",
        ]  # fmt: skip

    def run(self) -> dict[str, Any]:
        seconds, peak, text = ran(self.arguments, self.folder / "cache")
        record = json.loads(text)
        if record["repaired"] != 1:
            raise SystemExit(f"repaired {record['repaired']} of 1; nothing to time")
        parts = {name: round(value, 3) for name, value in record["timings"].items()}
        cost = {name: round(record["cost"][name], 2) for name in ("forward_equivalents", "steps")}
        return {"process": round(seconds, 2), "peak": peak, **cost, **parts}

    def runs(self, count: int) -> list[dict[str, Any]]:
        return [self.run() for _ in range(count)]


def medians(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {name: round(median(run[name] for run in runs), 3) for name in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--template", default="{prompt}{target}")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = Command(given, folder)
        weights, loaded = map(int, ran(["-c", LOADED, given.model], folder / "cache")[2].split())
        first, quiet = command.run(), command.runs(given.runs)
        with beside(SPINNING):
            spinning = command.runs(2)
        with beside(PRODUCTS):
            products = command.runs(2)
        patch = (folder / "patch.safetensors").stat().st_size
    found = {
        "first": medians([first]), "quiet": medians(quiet), "beside_spinning": medians(spinning),
        "beside_products": medians(products),
    }  # fmt: skip
    for one in found.values():
        one["memory"] = one["peak"] - loaded
    record = {
        "model": Path(given.model).name, "rows": Path(given.rows).name, "runs": given.runs,
        "machine": machine(torch.device("cpu")), "versions": versions(), "weights": weights, "loaded": loaded,
        "patch": patch, **found,
    }  # fmt: skip
    text = json.dumps(record, indent=1)
    if given.output:
        given.output.write_text(text + "\n", encoding="utf-8")
    print("| | " + " | ".join(found) + " |\n|---|" + "---|" * len(found))
    for part in found["quiet"]:
        print(f"| {part} | " + " | ".join(f"{one[part]:,}" for one in found.values()) + " |")


if __name__ == "__main__":
    main()
