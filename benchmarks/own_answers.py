"""The model's own passing sample against the given solution, as the target of a repair: which changes the model less?

    python benchmarks/own_answers.py MODEL benchmarks/tasks/repair.jsonl benchmarks/tasks/easy_repair.jsonl

Tasks whose greedy completion fails are sampled until a sample passes. Those for which one does are repaired twice,
each time alone from the untouched model: to the likeliest sample, and to the given solution. One JSON line a task
(KL on the first tokens of each shipped kind of text, and how unlikely the model finds each answer, in nats), then the
medians and how often the sample costs less. Needs a sandbox, as ``lmrepair fix`` does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from statistics import median
from typing import Any

from lmrepair import Failure, MinKl, Net, load, repair_each
from lmrepair.checks import Budget, Checker, Task, nats, read_tasks, runs, search, strongest
from lmrepair.checks.fixing import CLOSING, SEEDS
from lmrepair.failures import Reference, named, read_kinds
from lmrepair.measure import measure_drift

ANSWERS = ("own", "given")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model")
    options.add_argument("tasks", nargs="+")
    options.add_argument("--samples", type=int, default=64, help="most samples of a task")
    options.add_argument("--length", type=int, default=32, help="most tokens of a completion")
    options.add_argument("--characters", type=int, default=400, help="of each shipped text that KL is measured on")
    given = options.parse_args()
    net = load(given.model)
    net.model.requires_grad_(False)
    tasks = [task for path in given.tasks for task in read_tasks(path)]
    texts = [text[: given.characters] for kind in read_kinds() for text in kind.texts]
    rows = compared(net, tasks, Budget(given.samples, length=given.length), named("neutral", texts))
    print(json.dumps(summary(rows)))


def compared(net: Net, tasks: Sequence[Task], budget: Budget, reference: Reference) -> list[dict[str, Any]]:
    """A row for each task that is repaired to both answers, printed as it is made."""
    checker = Checker(strongest())
    before = runs(net, tasks, checker, budget.length)
    failing = [(at, task) for at, (task, run) in enumerate(zip(tasks, before, strict=True)) if not run.verdict.passed]
    found = search(net, [task for _, task in failing], checker, budget, [SEEDS * at for at, _ in failing])
    rows = []
    for (_, task), one in zip(failing, found, strict=True):
        if one.source != "sample" or one.target is None or not task.canonical:
            continue
        answers = (one.target, task.canonical.rstrip() + CLOSING)
        if answers[0] == answers[1]:
            print(json.dumps({"task": task.id, "same": True}), flush=True)
            continue
        sides = [measured(net, task.failure(answer), reference) for answer in answers]
        unlikely = nats(net, [task] * 2, answers)
        rows.append({
            "task": task.id, "temperature": one.temperature,
            **{name: {"answer": answer, "nats": cost, **side}
               for name, answer, cost, side in zip(ANSWERS, answers, unlikely, sides, strict=True)},
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def measured(net: Net, failure: Failure, reference: Reference) -> dict[str, Any]:
    """The failure repaired alone: whether it is, at which KL and which cost."""
    (made,) = repair_each(net, [failure], MinKl())
    kl = measure_drift(net, [made.patch], reference)[0].kl if made.patch is not None else None
    return {"repaired": made.repaired, "kl": kl, "forward_equivalents": made.cost.forward_equivalents}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over the tasks that are repaired both ways."""
    both = [row for row in rows if all(row[name]["repaired"] for name in ANSWERS)]
    medians = {
        name: {part: median(row[name][part] for row in both) for part in ("nats", "kl", "forward_equivalents")}
        for name in ANSWERS
        if both
    }
    less = sum(row["own"]["kl"] < row["given"]["kl"] for row in both)
    return {"tasks": len(rows), "both_repaired": len(both), "own_costs_less": less, **medians}


if __name__ == "__main__":
    main()
