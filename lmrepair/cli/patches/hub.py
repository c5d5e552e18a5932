"""The command ``push``: a patch on the hub, with a card that says what it is."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmrepair.cli.options import Json, PatchFile
from lmrepair.cli.output import drift_text, patch_data, show_result
from lmrepair.measure import visible

if TYPE_CHECKING:
    from lmrepair.patch import Patch

Name = Annotated[str, typer.Argument(metavar="NAME", help="The repository, OWNER/NAME; made if it is not there.")]
License = Annotated[str | None, typer.Option("--license", help="The card's licence, as the hub names it (apache-2.0).")]
Withheld = Annotated[
    bool, typer.Option("--private-failures", help="Leave the failures out of card and file; only their number is said.")
]
Private = Annotated[bool, typer.Option("--private", help="Make a repository that only its owner sees.")]
SHOWN = 100  # failures in a card


def push(
    patch: PatchFile,
    name: Name,
    license_name: License = None,
    private_failures: Withheld = False,
    private: Private = False,
    as_json: Json = False,
) -> None:
    """Put a patch on the hub, with a card: failures, figures, base, licence, how to serve."""
    from lmrepair.patch import CARD, FILE, Patch, upload

    loaded = Patch.load(patch)
    shared = withheld(loaded) if private_failures else loaded
    files = {FILE: shared.serialise(), CARD: card(shared, name, license_name).encode()}
    address = upload(name, files, private)
    data = {"repository": name, "address": address, "failures": len(shared.items), "withheld": shared.made.withheld}
    show_result(data, [f"pushed {len(files[FILE]):,} bytes → hub:{name} ({visible(address, None)})"], as_json)


def withheld(patch: Patch) -> Patch:
    """The patch without any text, id or token of its failures: only how many there were."""
    gate = {key: value for key, value in patch.made.gate.items() if key not in ("refused", "dropped")}
    count = len(patch.items) or patch.made.withheld
    return replace(patch, items=(), made=replace(patch.made, gate=gate, withheld=count))


def card(patch: Patch, name: str, license_name: str | None) -> str:
    """The repository's page: YAML in front for the hub, then what people want to know."""
    data = patch_data(patch)
    front = {"library_name": "lmrepair", "tags": ["lmrepair", "model-repair", "patch"]}
    if license_name:
        front["license"] = license_name
    if data["model"].count("/") == 1:
        front["base_model"] = data["model"]
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    return f"---\n{head}\n---\n\n" + "\n".join([*_figures(patch, data, name), *_failures(patch), ""])


def _figures(patch: Patch, data: dict[str, Any], name: str) -> list[str]:
    title, model = name.split("/")[-1], _code(data["model"])
    drift = data["drift"]
    lines = [
        f"# {title}",
        "",
        f"A repair of {model} by [lmrepair](https://pypi.org/project/lmrepair/): a verified, reversible change of "
        f"{data['neurons']:,} neurons in {patch.layers} layers ({data['bytes']:,} bytes).",
        "",
        f"- base: {model} in {data['dtype']}, bit for bit the one with the digest `{data['fingerprint']}`",
        f"- method: {_code(data['method'])}",
    ]
    if drift:
        lines.append(f"- drift: {drift_text(drift['kl'], drift['agreement'])} on {_code(drift['reference'])}")
    at = f"hub:{name}"
    return [
        *lines,
        "",
        "## How to use it",
        "",
        "```",
        f"lmrepair verify {at} --model BASE",
        f"lmrepair apply {at} --model BASE --output PATCHED",
        f"lmrepair export {at} --model BASE --to peft ADAPTER    # or: --base BASE.gguf --to gguf ADAPTER.gguf",
        f"lmrepair revert {at} --model PATCHED --output BASE",
        "```",
        "",
    ]


def _failures(patch: Patch) -> list[str]:
    if patch.made.withheld:
        return [f"## Failures\n\nIt was made for {patch.made.withheld} failures, which are not public."]
    repaired = sum(item.repaired for item in patch.items)
    lines = [
        f"## Failures\n\nIt repairs {repaired} of {len(patch.items)}.",
        "",
        "| prompt | target | |",
        "|---|---|---|",
    ]
    for item in patch.items[:SHOWN]:
        mark = "repaired" if item.repaired else "not repaired" if item.reason else "right before"
        lines.append(f"| {_code(item.prompt)} | {_code(item.target)} | {mark} |")
    return lines + [f"\nand {len(patch.items) - SHOWN} more"] * (len(patch.items) > SHOWN)


def _code(text: Any) -> str:
    """Text of a stranger as code in a table's cell: nothing of it is markup."""
    shown = visible(str(text), 200).replace("|", "¦")
    ticks = "`"
    while ticks in shown:
        ticks += "`"
    return f"{ticks} {shown} {ticks}" if "`" in shown else f"`{shown}`"
