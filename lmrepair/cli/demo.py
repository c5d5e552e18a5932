"""The demo: the whole way on the model that ships, on API habits it really has."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lmrepair.cli.output import drift_text
from lmrepair.diagnosis import diagnose
from lmrepair.failures import Failure, Tokens, read_failures, read_lines, read_reference, shipped
from lmrepair.loop import repair
from lmrepair.measure import verify, visible
from lmrepair.model import EMBEDDED, Net, fingerprint, load
from lmrepair.patch import Patch

ANSWER = 12  # tokens of a free answer


def run_demo(device: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Diagnose, repair, save, verify on a fresh load and take back; report by lines, return the figures."""
    folder = shipped("")
    failures = read_failures(folder / "failures.jsonl")
    neighbours = [str(row["prompt"]) for _, row in read_lines(folder / "neighbours.jsonl")]
    wordings = [
        replace(other, id=f"{failure.id}.{number}")
        for failure in failures
        for number, other in enumerate(failure.otherwise())
    ]
    net = load(EMBEDDED, device=device)
    untouched = fingerprint(net, {})
    parameters = sum(parameter.numel() for parameter in net.model.parameters())
    say(f"The model that ships: {parameters / 1e6:.1f} million parameters, trained on the Python standard library.\n")

    before = _answers(net, failures)
    worded_before = _share_right(net, wordings)
    nearby_before = _free(net, neighbours)
    result = repair(net, failures)
    after = _answers(net, failures)
    say(f"{result.failing} prompts it completes wrongly, before and after the repair:\n")
    for failure, old, new in zip(failures, before, after, strict=True):
        say(f"  {visible(failure.prompt, 64)}")
        say(f"      said {visible(old):32s} now says {visible(new)}")
    worded_after = _share_right(net, wordings)
    nearby_after = _free(net, neighbours)
    same = sum(old == new for old, new in zip(nearby_before, nearby_after, strict=True))

    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "demo.safetensors"
        if result.patch is not None:
            result.patch.save(path)
            result.patch.revert(net)
        restored = fingerprint(net, {}) == untouched
        verified = result.patch is not None and _verify_fresh(path, device)
    data = {
        "model": net.name,
        "failing": result.failing,
        "repaired": result.repaired,
        "wordings": {"count": len(wordings), "right_before": worded_before, "right_after": worded_after},
        "neighbours": {"count": len(neighbours), "unchanged": same},
        "drift": None if result.drift is None else {"kl": result.drift.kl, "agreement": result.drift.agreement},
        "cost": {"seconds": result.cost.seconds, "forward_equivalents": result.cost.forward_equivalents},
        "patch": {"neurons": result.patch.neurons, "bytes": result.patch.size} if result.patch else None,
        "verified": verified,
        "restored": restored,
    }
    _summarise(data, nearby_before, nearby_after, neighbours, say)
    return data


def _summarise(
    data: dict[str, Any],
    before: Sequence[str],
    after: Sequence[str],
    prompts: Sequence[str],
    say: Callable[[str], None],
) -> None:
    wordings, neighbours, patch = data["wordings"], data["neighbours"], data["patch"]
    say("\nUntouched neighbours, which must stay as they are:\n")
    for prompt, old, new in zip(prompts, before, after, strict=True):
        change = "unchanged" if old == new else f"now {visible(new, 40)}"
        say(f"  {visible(prompt, 48):50s} {visible(old, 36):38s} {change}")
    say("")
    say(f"repaired        {data['repaired']} of {data['failing']}")
    right = f"{wordings['right_before']} of {wordings['count']} right before, {wordings['right_after']} after"
    say(f"other wordings  {right}")
    say(f"neighbours      {neighbours['unchanged']} of {neighbours['count']} unchanged")
    if data["drift"]:
        say(f"drift           {drift_text(data['drift']['kl'], data['drift']['agreement'])}")
    cost = data["cost"]
    say(f"cost            {cost['seconds']:.2f} s, {cost['forward_equivalents']:.0f} forward equivalents")
    if patch:
        say(f"patch           {patch['neurons']:,} neurons, {patch['bytes'] / 1000:,.0f} kB")
    say(f"saved patch     {'verified on a fresh load' if data['verified'] else 'NOT verified'}")
    say(f"taken back      {'bit for bit' if data['restored'] else 'NOT bit for bit'}")


def _verify_fresh(path: Path, device: str) -> bool:
    net = load(EMBEDDED, device=device)
    return verify(net, Patch.load(path), read_reference()).verified


def _answers(net: Net, failures: Sequence[Failure]) -> list[str]:
    """What the model writes freely where each target is wanted, as long as the target."""
    return [_text(net, ids) for ids in net.generate(net.tokenize(failures))]


def _free(net: Net, prompts: Sequence[str]) -> list[str]:
    """The first line of what the model writes after each prompt."""
    tokens = [Tokens(prompt, tuple(net.tokenizer(prompt)["input_ids"]), (0,) * ANSWER) for prompt in prompts]
    return [_text(net, ids).split("\n")[0] for ids in net.generate(tokens)]


def _share_right(net: Net, failures: Sequence[Failure]) -> int:
    return sum(not item.mistakes for item in diagnose(net, failures))


def _text(net: Net, ids: Sequence[int]) -> str:
    return str(net.tokenizer.decode(torch.tensor(list(ids), dtype=torch.long)))
