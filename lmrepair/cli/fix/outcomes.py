"""What ``check`` and ``fix`` found, as data and as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lmrepair.checks import Task, Verdict, kinds
from lmrepair.measure import bootstrap, paired, visible

if TYPE_CHECKING:
    from lmrepair.checks import Fixed, Item, Run
    from lmrepair.measure import Interval


def check_data(
    model: str, sandbox: str, tasks: Sequence[Task], completions: Sequence[str], found: Sequence[Verdict]
) -> dict[str, Any]:
    """What ``check --json`` prints."""
    passing = [float(one.passed) for one in found]
    return {
        "tasks": len(tasks),
        "passing": int(sum(passing)),
        "pass_at_1": _interval(bootstrap(passing)),
        "outcomes": kinds(found),
        "model": model,
        "sandbox": sandbox,
        "items": [
            {"id": task.id, "completion": text, "outcome": one.data()}
            for task, text, one in zip(tasks, completions, found, strict=True)
        ],
    }


def check_text(data: dict[str, Any]) -> list[str]:
    """The same as lines."""
    failing = [item for item in data["items"] if item["outcome"]["kind"] != "passed"]
    lines = [
        f"✗ {visible(item['id'], 24):24} {_outcome(item['outcome']):32} {visible(item['completion'].strip(), 56)}"
        for item in failing
    ]
    return [
        *lines,
        f"passed     {data['passing']} of {data['tasks']}, pass@1 {_percent(data['pass_at_1'])}",
        "outcomes   " + ", ".join(f"{visible(kind)} {count}" for kind, count in data["outcomes"].items()),
        f"sandbox    {data['sandbox']}",
    ]


def fix_data(model: str, sandbox: str, result: Fixed, patch: str | None) -> dict[str, Any]:
    """What ``fix --json`` prints."""
    items, repair = result.items, result.repair
    others = [(before, after) for item in items for before, after in item.others.values()]
    drift = repair.drift if repair is not None else None
    return {
        "tasks": len(items),
        "passing_before": sum(item.before.verdict.passed for item in items),
        "in_reach": sum(item.in_reach for item in items),
        "repaired": sum(item.repaired for item in items),
        "broken": sum(item.broken for item in items),
        "passing_after": sum(item.after.verdict.passed for item in items),
        "drift": None if drift is None else {"kl": drift.kl, "agreement": drift.agreement, "tokens": drift.tokens},
        "patch": patch,
        "gate": repair.gate.data() if repair is not None and repair.gate is not None else None,
        "cost": {
            "seconds": {name: round(value, 3) for name, value in result.seconds.items()},
            "forward_equivalents": repair.cost.forward_equivalents if repair is not None else 0.0,
            "samples": sum(item.search.samples for item in items if item.search is not None),
            "neurons": repair.patch.neurons if repair is not None and repair.patch is not None else 0,
            "bytes": repair.patch.size if repair is not None and repair.patch is not None else 0,
        },
        "other_wordings": _before_after(others),
        **{name: _before_after([(b, a) for _, b, a in group]) for name, group in result.groups.items()},
        "model": model,
        "method": repair.method.name if repair is not None else None,
        "sandbox": sandbox,
        "items": [_item(item) for item in items],
    }


def fix_text(data: dict[str, Any]) -> list[str]:
    """The same as lines."""
    lines = []
    for item in data["items"]:
        was, now = item["before"]["outcome"]["kind"], item["after"]["outcome"]["kind"]
        mark = "✓" if now == "passed" else "✗"
        if was == now == "passed":
            continue
        aim = item["target"] or {"source": "out of reach", "text": ""}
        shown = f"{aim['source']:12} {visible(aim['text'].strip(), 48)}"
        why = f"  ({visible(item['reason'], 80)})" if item["reason"] and item["target"] else ""
        lines.append(f"{mark} {visible(item['id'], 24):24} {_outcome(item['before']['outcome']):20} {shown}{why}")
    total, cost, reach, before = data["tasks"], data["cost"], data["in_reach"], data["passing_before"]
    lines += [
        "",
        f"passing    {before} before, {data['passing_after']} after, of {total}, {data['broken']} broken",
        f"repaired   {data['repaired']} of {reach} in reach, {total - before - reach} out of reach",
    ]
    for name, shown in (("other_wordings", "reworded"), ("wordings", "wordings"), ("held_out", "held out")):
        if data.get(name):
            part = data[name]
            lines.append(
                f"{shown:10} {part['before']} of {part['tasks']} before, {part['after']} after; "
                f"difference {_percent(part['difference'])}"
            )
    if data["drift"]:
        drift = data["drift"]
        lines.append(f"drift      KL {drift['kl']:.5f} nats/token, {drift['agreement']:.2%} of top tokens unchanged")
    spent = ", ".join(f"{name} {value:.1f} s" for name, value in cost["seconds"].items())
    lines.append(
        f"cost       {spent}; {cost['samples']} samples, {cost['forward_equivalents']:.0f} forward equivalents"
    )
    size = f"{cost['neurons']:,} neurons, {cost['bytes'] / 1e6:.1f} MB"
    lines.append(f"patch      {visible(data['patch'], None)}, {size}" if data["patch"] else "patch      none")
    return lines


def _item(item: Item) -> dict[str, Any]:
    tried = item.search
    aim = None
    if tried is not None and tried.target is not None:
        named = {"text": tried.target, "source": tried.source, "nats": tried.nats}
        aim = named | ({"temperature": tried.temperature} if tried.source == "sample" else {})
    return {
        "id": item.task.id,
        "prompt": item.task.prompt or [dict(message) for message in item.task.messages],
        "before": _run(item.before),
        "after": _run(item.after),
        "target": aim,
        "reason": item.reason,
        "tried": None
        if tried is None
        else {
            "samples": tried.samples,
            "passing": tried.passing,
            "seconds": round(tried.seconds, 3),
            "rejected": [{"completion": text, "outcome": one.data()} for text, one in tried.rejected],
        },
        "wordings": {rule: {"before": _run(b), "after": _run(a)} for rule, (b, a) in item.others.items()},
    }


def _run(run: Run) -> dict[str, Any]:
    return {"completion": run.written.completion, "outcome": run.verdict.data()}


def _before_after(pairs: Sequence[tuple[Run, Run]]) -> dict[str, Any] | None:
    """pass@1 of other tasks before and after, and the paired difference."""
    if not pairs:
        return None
    before = [float(one.verdict.passed) for one, _ in pairs]
    after = [float(one.verdict.passed) for _, one in pairs]
    return {
        "tasks": len(pairs),
        "before": int(sum(before)),
        "after": int(sum(after)),
        "difference": _interval(paired(after, before)),
    }


def _interval(found: Interval) -> dict[str, float]:
    return {"mean": found.mean, "low": found.low, "high": found.high}


def _percent(found: dict[str, float]) -> str:
    return f"{found['mean']:.1%} ({found['low']:.1%} to {found['high']:.1%})"


def _outcome(outcome: dict[str, Any]) -> str:
    kind, detail = outcome["kind"], outcome["detail"]
    return visible(detail.partition(":")[0] if kind == "exception" else kind, 32)
