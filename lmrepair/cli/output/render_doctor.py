"""What ``lmrepair doctor`` found, as plain data (``--json``) and as text. Imports no model code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lmrepair.measure import plain, visible

if TYPE_CHECKING:
    from lmrepair.measure import Examination

PROOF = (
    "proved: a column changed in place shows as coefficient × change, at every position, and is read by nothing else"
)


def doctor_data(found: Examination) -> dict[str, Any]:
    """What ``doctor --json`` prints."""
    data: dict[str, Any] = plain(found)
    return {**data, "fits": [need["settings"] for need in data["needs"] if need["fits"]]}


def doctor_text(data: dict[str, Any]) -> list[str]:
    """The same as lines."""
    dtypes = ", ".join(f"{visible(name)} {_bytes(size)}" for name, size in data["dtypes"].items())
    kind = f"{visible(data['kind'])}, {data['parameters'] / 1e6:,.1f} M parameters, {visible(data['source'])}"
    return [
        f"model      {visible(data['model'], None)}: {kind}",
        f"weights    {dtypes} on {data['device']}",
        *_places(data["places"]),
        *_logits(data["logits"]),
        f"context    {_context(data['context'])}",
        f"chat       {_chat(data['turn_end'])}",
        *_traps(data),
        "",
        *_needs(data),
        "",
        *_served(data["served"]),
    ]


def _places(found: dict[str, Any]) -> list[str]:
    widths = sorted(set(found["neurons"]))
    wide = f"{widths[0]:,}" if len(widths) == 1 else f"{widths[0]:,} to {widths[-1]:,}"
    names = visible(", ".join(found["ffn"]), None)
    norm = visible(found["norm"], None) if found["norm"] else "none that the head reads just so"
    return [
        f"FFN        {names}: {found['layers']} layers of {wide} neurons, each writes {found['hidden']:,} numbers",
        f"           {PROOF}",
        f"norm       {norm}",
        f"           found in {found['seconds']:.1f} s",
    ]


def _logits(found: dict[str, Any]) -> list[str]:
    tied = "tied to the embeddings" if found["tied"] else "apart from the embeddings"
    after = "nothing follows"
    if not found["plain"]:
        after = "what follows is neither a scale nor a cap: logits are read from the model"
    elif found["cap"]:
        after = f"soft-capped at {found['cap']:g}"
    elif found["scale"] != 1:
        after = f"scaled by {found['scale']:.4g}"
    return [f"head       {found['vocabulary']:,} tokens, {tied}; {after}"]


def _context(positions: int | None) -> str:
    return "no limit in the config" if positions is None else f"{positions:,} tokens"


def _chat(end: str | None) -> str:
    if end is None:
        return "no template: give prompts, not messages"
    return f"template there; {visible(end)} ends a turn" if end else "template there; no token ends a turn"


def _traps(data: dict[str, Any]) -> list[str]:
    found: Sequence[dict[str, Any]] = data["traps"]
    lines = [f"{trap['kind']:10s} {visible(trap['text'], None)}" for trap in found]
    return [f"tokens     {data['tokens']:,}; {len(found) or 'nothing'} to know of them{':' if found else ''}", *lines]


def _needs(data: dict[str, Any]) -> list[str]:
    free = f"one short failure; {_bytes(data['free'])} free"
    lines = [f"{'settings (' + free + ')':52s} {'memory':>9s} {'once':>8s} {'a repair':>9s}"]
    for need in data["needs"]:
        once = _time(need["statistics_seconds"]) if need["statistics_seconds"] else "—"
        row = f"  {need['settings']:50s} {_bytes(need['bytes']):>9s} {once:>8s} {_time(need['seconds']):>9s}"
        lines.append(row + ("" if need["fits"] else "  does not fit"))
    if not data["fits"]:
        lines.append("  none fits: load it with --dtype bfloat16, or on a device with more memory")
    return lines


def _served(found: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for one in found:
        said = f"no: {visible(one['refused'], None)}" if one["refused"] else "yes"
        lines.append(f"{'--to ' + one['kind']:12s} {one['engines']}: {said}")
    return lines


def _time(seconds: float) -> str:
    return (
        f"{seconds:.1f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.0f} h"
    )


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
