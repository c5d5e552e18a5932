"""Many failures of mixed tasks on one model: together in one patch, or one after another with memory.

    python benchmarks/many.py --model MODEL --data FOLDER --count 100 --margin 0.1 --output result.json
    python benchmarks/many.py --model MODEL --data FOLDER --count 100 --in-turn --output result.json

FOLDER holds TASK.test.jsonl and TASK.dev.jsonl for the tasks named in TEMPLATES (dev rows with their answers
measure drift) and python.heldout.jsonl. Tasks take turns; a prompt that comes twice is taken once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from main_job import TEMPLATES, failing_rows

from lmrepair.bench.machine import Peak, machine, versions
from lmrepair.failures.reference import Reference, named, read_kinds, read_reference
from lmrepair.failures.rows import Failure, read_failures
from lmrepair.loop.gate import Gate
from lmrepair.loop.loop import repair
from lmrepair.measure.answer import answers
from lmrepair.measure.drift import measure_drift_by_kind
from lmrepair.methods import method_named
from lmrepair.methods.base import Method
from lmrepair.model.edit import Projections
from lmrepair.model.loading import load
from lmrepair.model.net import Net
from lmrepair.model.statistics import statistics_of
from lmrepair.model.statistics.moments import Statistics
from lmrepair.patch.patch import Patch

ROWS = 48  # dev rows a task that drift is measured on


def mixed(net: Net, data: Path, count: int) -> list[Failure]:
    """Failing test rows, one task after another in turn."""
    tasks = [failing_rows(net, data / f"{task}.test.jsonl", template, count) for task, template in TEMPLATES.items()]
    turns = [row for turn in itertools.zip_longest(*tasks) for row in turn if row is not None]
    once = list({row.prompt: row for row in reversed(turns)}.values())[::-1]
    return [Failure(row.prompt, row.target, str(number)) for number, row in enumerate(once[:count], start=1)]


def references(data: Path) -> list[Reference]:
    found = [named("python", read_reference(data / "python.heldout.jsonl").texts)]
    for task, template in TEMPLATES.items():
        rows = read_failures(data / f"{task}.dev.jsonl", template)[:ROWS]
        found.append(named(task, [row.prompt + row.target for row in rows]))
    return found


def holding(net: Net, rows: list[Failure]) -> int:
    """Of how many rows the answer comes out, preferred and written freely."""
    return sum(one.holds for one in answers(net, net.tokenize(rows)))


def together(
    net: Net, rows: list[Failure], method: Method, text: Reference, known: Statistics | None
) -> tuple[dict[str, Any], list[Patch]]:
    result = repair(net, rows, method, text, statistics=known)
    made = {
        "repaired": result.repaired,
        "steps": result.cost.steps,
        "forward_equivalents": result.cost.forward_equivalents,
        "reasons": [outcome.reason for outcome in result.outcomes if outcome.reason],
    }
    return made, [result.patch] if result.patch else []


def in_turn(
    net: Net, rows: list[Failure], method: Method, text: Reference, known: Statistics | None
) -> tuple[dict[str, Any], list[Patch]]:
    """Each on the model that the repairs before it left, with their patches as memory; the gate reads ``text``."""
    patches: list[Patch] = []
    counts, seconds = {"right_at_their_turn": 0, "repaired": 0}, []
    for done, row in enumerate(rows):
        began = time.perf_counter()
        result = repair(net, [row], method, text, statistics=known, gate=Gate(memory=tuple(patches)))
        seconds.append(time.perf_counter() - began)
        counts["right_at_their_turn"] += result.failing == 0
        counts["repaired"] += result.repaired
        if result.patch is not None:
            patches.append(result.patch)
        if done % 10 == 9:
            print(done + 1, counts, f"{seconds[-1]:.1f} s", flush=True)
    return {**counts, "seconds_median": statistics.median(seconds), "seconds_last": seconds[-1]}, patches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--method", default="minkl")
    parser.add_argument("--margin", type=float)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--own-texts", type=int, help="how many texts the model writes for its statistics")
    parser.add_argument("--in-turn", action="store_true")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    net = load(options.model)
    rows = mixed(net, options.data, options.count)
    method = method_named(options.method, None, **({} if options.margin is None else {"margin": options.margin}))
    kinds, asked = references(options.data), method.asks()
    known = statistics_of(net, asked, own=options.own_texts) if asked else None
    peak = Peak(net.device)
    peak.start()
    began = time.perf_counter()
    figures, patches = (in_turn if options.in_turn else together)(net, rows, method, kinds[0], known)
    spent, most = time.perf_counter() - began, peak.read()
    held, final = holding(net, rows), Projections.of(net)
    for patch in reversed(patches):
        patch.revert(net)
    shipped, own = (measure_drift_by_kind(net, [final], found)[0] for found in (read_kinds(), kinds))
    result: dict[str, Any] = {
        "model": net.name,
        "settings": {"name": method.name, **method.settings()},
        "statistics": known.name if known else None,
        "failing": len(rows),
        "in_turn": options.in_turn,
        **figures,
        "holding": held,
        "kl": {name.partition("@")[0]: drift.kl for name, drift in own.items()},
        "kl_shipped_mean": statistics.fmean(drift.kl for drift in shipped.values()),
        "kl_shipped_worst": next(iter(shipped.items()))[1].kl,
        "seconds": spent,
        "peak_memory": most,
        "patch_bytes": sum(patch.size for patch in patches),
        "machine": machine(net.device),
        "versions": versions(),
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
