"""What the steps of a method do to a model: repaired, KL, forward equivalents, other wordings, failure by failure.

    python benchmarks/steps.py MODEL --rows FILE[:TEMPLATE] ... --methods "star" "star:paper" "finetune?stride=0.02"

Each failing row is repaired alone from the untouched model. KL is measured on the first tokens of each shipped
kind of reference text. One JSON line a row and method, then a summary of each method.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from statistics import mean, median
from typing import Any

import torch

from lmrepair import Failure, Method, Net, Patch, Repair, diagnose, load, read_failures, repair_each
from lmrepair.failures import Reference, named, read_kinds
from lmrepair.measure import measure_drift
from lmrepair.methods import method_named


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model")
    options.add_argument("--rows", nargs="+", required=True, help="JSON lines, each with :TEMPLATE behind it, or not")
    options.add_argument("--limit", type=int, nargs="+", default=[6], help="failing rows of each file")
    options.add_argument("--methods", nargs="+", default=["star"], help="METHOD[:PRESET][?SETTING=VALUE&...]")
    options.add_argument("--tokens", type=int, default=120, help="of each kind of reference text")
    options.add_argument("--dtype", default="auto")
    given = options.parse_args()
    net = load(given.model, dtype=given.dtype)
    net.model.requires_grad_(False)
    reference = _reference(net, given.tokens)
    limits = given.limit * len(given.rows) if len(given.limit) == 1 else given.limit
    rows = [row for spec, most in zip(given.rows, limits, strict=True) for row in islice(_failing(net, spec), most)]
    table: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name in given.methods:
        for row, result in zip(rows, repair_each(net, rows, _method(name)), strict=True):
            found = _measured(net, row, result, reference)
            table[name].append(found)
            print(json.dumps({"row": row.id, "method": name, **found}), flush=True)
    for name, found in table.items():
        print(_summary(name, found), flush=True)


def _method(text: str) -> Method:
    head, _, settings = text.partition("?")
    name, _, preset = head.partition(":")
    pairs = (part.partition("=")[::2] for part in settings.split("&") if part)
    return method_named(name, preset or None, **{key: _value(value) for key, value in pairs})


def _value(text: str) -> Any:
    if text == "inf":
        return float(text)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return text if isinstance(value, int) and text == "1" else value


def _failing(net: Net, spec: str) -> Iterator[Failure]:
    path, _, template = spec.partition(":")
    for row in read_failures(path, template or None):
        (found,) = diagnose(net, [row])
        if found.mistakes:
            yield row


def _reference(net: Net, tokens: int) -> Reference:
    texts = [net.tokenizer.decode(net.tokenizer(kind.texts[0])["input_ids"][:tokens]) for kind in read_kinds()]
    return named("short", [str(text) for text in texts])


def _measured(net: Net, row: Failure, result: Repair, reference: Reference) -> dict[str, Any]:
    found: dict[str, Any] = {
        "repaired": bool(result.repaired), "steps": result.cost.steps, "fe": round(result.cost.forward_equivalents, 1),
        "kl": 0.0, "reason": result.outcomes[0].reason[:160],
    }  # fmt: skip
    worded = [Failure(str(text), row.target, str(at)) for at, text in enumerate(row.paraphrases)]
    if worded:
        found["wordings_before"] = _preferred(net, worded)
        found["wordings"] = found["wordings_before"]
    if result.patch is not None:
        (drift,) = measure_drift(net, [result.patch], reference)
        found["kl"] = drift.kl
        found |= _experts(net, result.patch)
        with result.patch.on(net):
            found |= {"wordings": _preferred(net, worded)} if worded else {}
    return found


def _experts(net: Net, patch: Patch) -> dict[str, int]:
    """Of a mixture: how many experts a patch changes, and how few hold 95 % of the change's squared norm."""
    parts: list[float] = []
    for layer, change in patch.changes.items():
        place = net.anatomy.ffns[layer]
        if place.dense:
            return {}
        whole = torch.zeros(place.width, dtype=torch.float64)
        whole[change.columns] = change.deltas.double().square().sum(dim=1)
        parts += [float(part.sum()) for part in whole.split(list(place.widths))]
    shares = torch.tensor(sorted(parts, reverse=True)).cumsum(0) / sum(parts)
    return {"experts": sum(part > 0 for part in parts), "experts_95": int((shares < 0.95).sum()) + 1}


def _preferred(net: Net, rows: Sequence[Failure]) -> float:
    """The share of target tokens that are preferred."""
    with torch.inference_mode():
        gap = net.prefer(net.batches(net.tokenize(rows))).gap
    return round(float((gap < 0).double().mean()), 4)


def _summary(name: str, found: Sequence[dict[str, Any]]) -> str:
    kls, worded = [row["kl"] for row in found], [row for row in found if "wordings" in row]
    parts = [
        f"repaired {sum(row['repaired'] for row in found)}/{len(found)}",
        f"KL mean {mean(kls):.5f} median {median(kls):.5f} max {max(kls):.5f}",
        f"FE median {median(row['fe'] for row in found)}",
        f"steps median {median(row['steps'] for row in found)}",
    ]
    if worded:
        before, after = (mean(row[key] for row in worded) for key in ("wordings_before", "wordings"))
        parts.append(f"wordings {before:.3f} -> {after:.3f}")
    for key, text in (("experts", "experts changed"), ("experts_95", "of 95 % of the change")):
        if counts := [row[key] for row in found if key in row]:
            parts.append(f"{text} {median(counts)}")
    return f"{name}: " + ", ".join(parts)


if __name__ == "__main__":
    main()
