"""The main job's figures: STAR by default, STAR as published and SGD, each failure alone, in one run.

    python benchmarks/main_job.py --model MODEL --data FOLDER --split test --failing 40 --output result.json

The methods take turns on every failure, so that their times are comparable. FOLDER holds
TASK.SPLIT.jsonl for the tasks named in TEMPLATES. Then the first failures of the joint task go into one patch.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lmrepair.diagnosis.mistakes import first_failing
from lmrepair.failures.reference import Reference, read_reference
from lmrepair.failures.rows import Failure, read_failures
from lmrepair.loop.loop import repair, repair_each
from lmrepair.loop.outcome import Repair
from lmrepair.measure.drift import measure_drift
from lmrepair.methods import method_named
from lmrepair.methods.base import Method
from lmrepair.model.loading import load
from lmrepair.model.net import Net

TEMPLATES = {
    "conala": "# {prompt}\\n{target}\\n",
    "ia32": "; {prompt}\\n{target}\\n",
    "tldr": "$ # {prompt}\\n{target}\\n",
}
METHODS = {"star": ("star", None), "star --preset paper": ("star", "paper"), "sgd --preset paper": ("sgd", "paper")}
JOINT, JOINT_COUNT = "conala", 30


def failing_rows(net: Net, path: Path, template: str, count: int | None = None) -> list[Failure]:
    """The first ``count`` rows (None: all) of a file in which the model makes a mistake."""
    rows = read_failures(path, template)
    return first_failing(net, rows, len(rows) if count is None else count)


def summary(net: Net, repairs: list[Repair], reference: Reference) -> dict[str, Any]:
    """Figures over repairs that were each made alone."""
    drifts = measure_drift(net, [one.patch for one in repairs if one.patch is not None], reference)
    equivalents = [one.cost.forward_equivalents for one in repairs]
    quartiles = statistics.quantiles(equivalents, n=4)
    outcomes = [outcome for one in repairs for outcome in one.outcomes]
    tokens = sum(len(outcome.tokens.target) for outcome in outcomes)
    return {
        "failing": sum(one.failing for one in repairs),
        "repaired": sum(one.repaired for one in repairs),
        "token_match_before": 1 - sum(len(outcome.before) for outcome in outcomes) / tokens,
        "token_match_after": 1 - sum(len(outcome.after) for outcome in outcomes) / tokens,
        "forward_equivalents": {"median": statistics.median(equivalents), "quartiles": [quartiles[0], quartiles[2]]},
        "steps_median": statistics.median(one.cost.steps for one in repairs),
        "kl_mean": statistics.fmean(drift.kl for drift in drifts),
        "kl_median": statistics.median(drift.kl for drift in drifts),
        "agreement_mean": statistics.fmean(drift.agreement for drift in drifts),
        "patch_bytes_mean": statistics.fmean(one.patch.size for one in repairs if one.patch is not None),
        "reasons": sorted({outcome.reason for outcome in outcomes if outcome.reason}),
    }


def alone(net: Net, rows: list[Failure], methods: dict[str, Method], reference: Reference) -> dict[str, Any]:
    made: dict[str, list[Repair]] = {name: [] for name in methods}
    for row in rows:
        for name, method in methods.items():
            made[name] += repair_each(net, [row], method)
    return {name: summary(net, repairs, reference) for name, repairs in made.items()}


def together(net: Net, rows: list[Failure], reference: Reference) -> dict[str, Any]:
    result = repair(net, rows, method_named("star"), reference)
    if result.patch is not None:
        result.patch.revert(net)
    return {
        "failing": result.failing,
        "repaired": result.repaired,
        "kl": result.drift.kl if result.drift else None,
        "agreement": result.drift.agreement if result.drift else None,
        "forward_equivalents": result.cost.forward_equivalents,
        "steps": result.cost.steps,
        "patch_bytes": result.patch.size if result.patch else None,
        "reasons": [outcome.reason for outcome in result.outcomes if outcome.reason],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--failing", type=int, default=40)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    net = load(options.model, device=options.device)
    reference = read_reference(options.reference)
    methods = {name: method_named(*which) for name, which in METHODS.items()}
    result: dict[str, Any] = {
        "model": net.name,
        "split": options.split,
        "reference": reference.name,
        "settings": {name: {"name": method.name, **method.settings()} for name, method in methods.items()},
        "threads": torch.get_num_threads(),
        "device": str(net.device) if net.device.type == "cpu" else torch.cuda.get_device_name(net.device),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("lmrepair", "torch", "transformers")},
        "alone": {},
    }
    for task, template in TEMPLATES.items():
        rows = failing_rows(net, options.data / f"{task}.{options.split}.jsonl", template, options.failing)
        result["alone"][task] = alone(net, rows, methods, reference)
        print(task, json.dumps(result["alone"][task], indent=1), flush=True)
    rows = failing_rows(net, options.data / f"{JOINT}.{options.split}.jsonl", TEMPLATES[JOINT], JOINT_COUNT)
    result["together"] = {JOINT: together(net, rows, reference)}
    print("together", json.dumps(result["together"], indent=1), flush=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
