"""Results as plain data (for ``--json``) and as text for a terminal. Imports no model code.

Everything that came from a prompt, a file or a model is shown through ``visible``: control characters,
which could drive a terminal, are spelled out, and nothing is read as markup.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lmrepair.measure import plain, visible

if TYPE_CHECKING:
    from lmrepair.diagnosis import Diagnosis, Mistake
    from lmrepair.loop import Outcome, Repair
    from lmrepair.measure import Drift
    from lmrepair.patch import Patch, PatchSize

Decode = Callable[[int], str]


def mistake_data(mistake: Mistake, decode: Decode) -> dict[str, Any]:
    return {**plain(mistake), "wanted_text": decode(mistake.wanted), "said_text": decode(mistake.said)}


def diagnosis_data(model: str, found: Sequence[Diagnosis], decode: Decode) -> dict[str, Any]:
    """What ``diagnose --json`` prints."""
    items = [
        {
            "id": item.tokens.id,
            "tokens": len(item.tokens.target),
            "mistakes": [mistake_data(mistake, decode) for mistake in item.mistakes],
        }
        for item in found
    ]
    return {
        "model": model,
        "failures": len(found),
        "failing": sum(bool(item.mistakes) for item in found),
        "mistakes": sum(len(item.mistakes) for item in found),
        "items": items,
    }


def diagnosis_text(found: Sequence[Diagnosis], texts: Iterable[tuple[str, str]], decode: Decode) -> list[str]:
    """A line for each failure, and one for each of its mistakes: what the model says, and what is wanted."""
    lines = []
    for item, (prompt, target) in zip(found, texts, strict=True):
        mark = "✗" if item.mistakes else "✓"
        lines.append(f"{mark} {visible(item.tokens.id, 20)}  {visible(prompt)} → {visible(target)}")
        for mistake in item.mistakes:
            said, wanted = decode(mistake.said), decode(mistake.wanted)
            where = f"{mistake.position + 1}/{len(item.tokens.target)}"
            lines.append(f"    {where:>7}  says {_quoted(said)}, wanted {_quoted(wanted)}  (gap {mistake.gap:.2f})")
    failing = sum(bool(item.mistakes) for item in found)
    lines += ["", f"{failing} of {len(found)} failures have mistakes, {sum(len(i.mistakes) for i in found)} in all"]
    return lines


def _quoted(text: str) -> str:
    return "‘" + visible(text, 30) + "’"


def item_data(outcome: Outcome, decode: Decode) -> dict[str, Any]:
    fixed = outcome.failing and outcome.repaired
    return {
        "id": outcome.tokens.id,
        "repaired": fixed,
        "before": len(outcome.before),
        "after": len(outcome.after),
        "reason": outcome.reason if outcome.failing or outcome.reason else "answered rightly before",
        "mistakes_before": [mistake_data(mistake, decode) for mistake in outcome.before],
        "mistakes_after": [mistake_data(mistake, decode) for mistake in outcome.after],
    }


def repair_data(
    model: str,
    repairs: Sequence[Repair],
    patches: Sequence[PatchSize],
    drifts: Sequence[Drift],
    path: str | None,
    decode: Decode,
) -> dict[str, Any]:
    """What ``repair --json`` prints: of one joint repair, or (means per repair) of many made alone."""
    outcomes = [outcome for repair in repairs for outcome in repair.outcomes]
    tried = [repair for repair in repairs if repair.failing]
    return {
        "model": model,
        "method": repairs[0].method.name,
        "settings": repairs[0].method.settings(),
        "failures": len(outcomes),
        "failing": sum(repair.failing for repair in repairs),
        "repaired": sum(repair.repaired for repair in repairs),
        "mistakes_before": sum(len(outcome.before) for outcome in outcomes),
        "mistakes_after": sum(len(outcome.after) for outcome in outcomes),
        "patch": {
            "path": path,
            "layers": _mean([patch.layers for patch in patches]),
            "neurons": _mean([patch.neurons for patch in patches]),
            "bytes": _mean([patch.bytes for patch in patches]),
        }
        if patches
        else None,
        "drift": {
            "kl": statistics.fmean(drift.kl for drift in drifts),
            "agreement": statistics.fmean(drift.agreement for drift in drifts),
            "tokens": drifts[0].tokens,
        }
        if drifts
        else None,
        "cost": {
            "seconds": _mean([repair.cost.seconds for repair in tried]),
            "forward_equivalents": _mean([repair.cost.forward_equivalents for repair in tried]),
            "forward_equivalents_median": _median([repair.cost.forward_equivalents for repair in tried]),
            "check_seconds": _mean([repair.cost.check_seconds for repair in tried]),
            "gate_seconds": _mean([repair.cost.gate_seconds for repair in tried]),
            "steps": _mean([repair.cost.steps for repair in tried]),
        },
        "gate": gate_data(repairs),
        "items": [item_data(outcome, decode) for outcome in outcomes],
    }


def gate_data(repairs: Sequence[Repair]) -> dict[str, Any] | None:
    """What the gate did: of one repair all of it; of many, how many patches passed whole, shrunk, or not."""
    found = [repair.gate for repair in repairs if repair.gate is not None]
    if not found:
        return None
    if len(repairs) == 1:
        return found[0].data()
    data = found[0].data()
    watched = ("max_kl", "protected", "protected_unwatched", "memory", "memory_unwatched")
    return {
        **{name: data[name] for name in watched},
        "whole": sum(one.scale == 1 for one in found),
        "shrunk": sum(0 < one.scale < 1 for one in found),
        "refused": sum(one.scale == 0 and bool(one.refused) for one in found),
    }


def gate_text(data: dict[str, Any] | None) -> list[str]:
    """The same as lines."""
    if data is None:
        return ["gate       none (--max-kl, --protect and --memory set one)"]
    limit = "no limit on KL" if data["max_kl"] is None else f"KL at most {data['max_kl']:g} nats/token"
    parts = [limit]
    for name, what in (("protected", "protected prompts"), ("memory", "earlier repairs")):
        count, not_so = data[name], data[f"{name}_unwatched"]
        if count or not_so:
            aside = f" ({not_so} more are not as described now, and are not watched)" if not_so else ""
            parts.append(f"{count} {what if count != 1 else what[:-1]}{aside}")
    lines = [f"gate       {', '.join(parts)}"]
    if "whole" in data:
        counts = f"{data['whole']} patches pass as solved, {data['shrunk']} shrunk, {data['refused']} do not"
        return [*lines, f"           {counts}"]
    if data["refused"]:
        lines.append(f"           refused as solved: {visible('; '.join(data['refused']), None)}")
        solves = f"{data['solves']} solve{'s' * (data['solves'] > 1)}, {data['weighed']} scales looked at"
        count = len(data["dropped"])
        size = "whole" if data["scale"] == 1 else f"at {data['scale']:.0%} of its size"
        kept = f"{'solved again and ' * (data['solves'] > 1)}kept {size}" if data["scale"] else "nothing is kept"
        lines.append(f"           {kept}, {count} failure{'s' * (count != 1)} left out ({solves})")
    elif data["scale"]:
        worst = next(iter(data["kl"].items()), None)
        seen = f", worst KL {worst[1]:.5f} on {visible(worst[0], None)}" if worst else ""
        lines.append(f"           passed as solved{seen}")
    return lines


def _mean(values: Sequence[float]) -> float:
    """The mean; a whole number stays one where there is one value only."""
    return values[0] if len(values) == 1 else statistics.fmean(values) if values else 0


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0


def repair_text(data: dict[str, Any], texts: Sequence[tuple[str, str]], reference: str) -> list[str]:
    """The same as lines: one for each failure, then what was made, what it changes and what it cost."""
    lines = []
    for item, (prompt, target) in zip(data["items"], texts, strict=True):
        mark = "✓" if item["repaired"] else "✗" if item["reason"] and (item["before"] or item["after"]) else "·"
        lines.append(_row(mark, item, prompt, target))
        if mark == "✗":
            lines.append(f"         {visible(item['reason'], None)}")
    cost, drift, patch = data["cost"], data["drift"], data["patch"]
    lines += ["", f"repaired   {data['repaired']} of {data['failing']} failing ({data['failures']} read)"]
    lines.append(f"mistakes   {data['mistakes_before']} → {data['mistakes_after']}")
    if patch:
        where = visible(patch["path"], None) if patch["path"] else "not saved"
        size = f"{patch['neurons']:,.0f} neurons in {patch['layers']:.0f} layers, {_bytes(patch['bytes'])}"
        lines.append(f"patch      {where}: {size}")
    else:
        lines.append("patch      none: nothing was repaired to be kept, the model is as it was")
    if drift:
        lines.append(
            f"drift      {drift_text(drift['kl'], drift['agreement'])} on {reference}, {drift['tokens']:,} tokens"
        )
    lines += gate_text(data["gate"])
    forward = f"{cost['forward_equivalents']:.0f} forward equivalents, {cost['steps']:.0f} steps"
    lines.append(f"cost       {cost['seconds']:.2f} s, {forward} (greedy check {cost['check_seconds']:.2f} s)")
    return lines


def drift_text(kl: float, agreement: float) -> str:
    return f"KL {kl:.5f} nats/token, {agreement:.2%} of top tokens unchanged"


def _row(mark: str, item: dict[str, Any], prompt: str, target: str) -> str:
    counts = f"{item['before']} → {item['after']}"
    return f"{mark} {visible(item['id'], 20):>5}  {counts:>8}  {visible(prompt, 44)} → {visible(target, 44)}"


def _bytes(count: float) -> str:
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def patch_data(patch: Patch, needed: Mapping[int, Sequence[str]] | None = None) -> dict[str, Any]:
    """What ``show --json`` prints; ``needed``: layer → ids of the failures that need it, where that was looked at."""
    from lmrepair.patch import by_layer

    return {
        "model": patch.made.model,
        "dtype": str(patch.dtype).removeprefix("torch."),
        "method": patch.made.method,
        "settings": dict(patch.made.settings),
        "layers": {str(layer): len(change.columns) for layer, change in patch.changes.items()},
        "by_layer": [
            vars(part) if needed is None else {**vars(part), "needed_by": list(needed[part.layer])}
            for part in by_layer(patch)
        ],
        "parts": dict(patch.made.settings["parts"]) if patch.made.method == "compose" else {},
        "neurons": patch.neurons,
        "bytes": patch.size,
        "largest_delta": max(change.largest for change in patch.changes.values()),
        "drift": dict(patch.made.drift),
        "gate": dict(patch.made.gate),
        "versions": dict(patch.made.versions),
        "fingerprint": patch.fingerprint.body,
        "failures": [
            {
                "id": item.tokens.id,
                "prompt": item.prompt,
                "target": item.target,
                "repaired": item.repaired,
                "before": len(item.before),
                "after": len(item.after),
                "reason": item.reason,
            }
            for item in patch.items
        ],
    }


def _needed(part: Mapping[str, Any]) -> str:
    if "needed_by" not in part:
        return ""
    ids = [visible(one, 40) for one in part["needed_by"][:5]]
    more = f" and {len(part['needed_by']) - 5} more" if len(part["needed_by"]) > 5 else ""
    return f", needed by {', '.join(ids)}{more}" if ids else ", no failure needs it alone"


def patch_text(data: dict[str, Any]) -> list[str]:
    """The same as lines."""
    settings = ", ".join(f"{key} {value}" for key, value in data["settings"].items() if not data["parts"])
    drift = data["drift"]
    lines = [
        f"made for   {visible(data['model'], None)} in {data['dtype']} (body {data['fingerprint'][:16]}…)",
        f"method     {visible(data['method'], None)} ({visible(settings or ', '.join(data['parts']), None)})",
        f"changes    {data['neurons']:,} neurons, {_bytes(data['bytes'])}",
        *(
            f"layer {part['layer']:>4} {part['neurons']:>7,} neurons, rank {part['rank']:>4}, norm {part['norm']:.3g}, "
            f"{_bytes(part['bytes'])}{_needed(part)}"
            for part in data["by_layer"]
        ),
        f"largest    delta {data['largest_delta']:.2e}",
    ]
    if drift:
        lines.append(f"drift      {drift_text(drift['kl'], drift['agreement'])} on {visible(str(drift['reference']))}")
    if data["gate"]:
        names = ("max_kl", "scale", "protected", "memory", "solves")
        shown = ", ".join(f"{name} {data['gate'].get(name)}" for name in names)
        lines.append(f"gate       passed ({visible(shown, None)})")
    versions = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    lines += [f"versions   {visible(versions, None)}", ""]
    for item in data["failures"]:
        mark = "✓" if item["repaired"] else "✗" if item["reason"] else "·"
        lines.append(_row(mark, item, item["prompt"], item["target"]))
    return lines
