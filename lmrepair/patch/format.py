"""The patch as a file: what it holds and how it is checked.

docs/patch-format.md describes it field by field.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lmrepair.errors import PatchError
from lmrepair.failures import Tokens
from lmrepair.model import DTYPES, Change, Fingerprint

FORMAT = 1
KEY = "lmrepair"
HEADER_LIMIT = 64 * 1024 * 1024
_DIGEST = re.compile(rb'\\"digest\\":\\"([0-9a-f]{64})\\"')


@dataclass(frozen=True)
class Item:
    """One failure of a patch: its exact token ids, its texts, and its mistakes before and after.

    A mistake is (position, wanted, said, gap), as in ``lmrepair.diagnosis.Mistake``.
    """

    tokens: Tokens
    prompt: str
    target: str
    repaired: bool
    before: tuple[tuple[int, int, int, float], ...]
    after: tuple[tuple[int, int, int, float], ...]
    reason: str = ""


@dataclass(frozen=True)
class Made:
    """How a patch came about: model, method with its settings, what the reference text showed, what the gate did."""

    model: str
    method: str
    settings: Mapping[str, Any]
    drift: Mapping[str, Any]
    versions: Mapping[str, str]
    gate: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contents:
    """Everything a patch file holds: layer → ``Change``, failures, how it was made, for which model."""

    changes: Mapping[int, Change]
    items: tuple[Item, ...]
    made: Made
    fingerprint: Fingerprint

    def serialise(self) -> bytes:
        """The bytes of the file, with their digest; the same contents give the same bytes."""
        tensors = {}
        for layer, change in sorted(self.changes.items()):
            tensors[f"layers.{layer}.columns"] = change.columns.cpu().contiguous()
            tensors[f"layers.{layer}.deltas"] = change.deltas.cpu().contiguous()
            tensors[f"layers.{layer}.originals"] = change.originals.cpu().contiguous()
        record = {
            "digest": "0" * 64,
            "format": FORMAT,
            "model": {
                "name": self.made.model,
                "body": self.fingerprint.body,
                "layers": list(self.fingerprint.layers),
            },
            "method": {"name": self.made.method, "settings": dict(self.made.settings)},
            "failures": [_item_out(item) for item in self.items],
            "drift": dict(self.made.drift),
            "versions": dict(self.made.versions),
            **({"gate": dict(self.made.gate)} if self.made.gate else {}),
            **({"source": dict(self.made.source)} if self.made.source else {}),
        }
        text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
        blank = safetensors.torch.save(tensors, {KEY: text})
        return _stamp(blank)


def read_contents(path: Path) -> Contents:
    """Read and check a patch file. Raises PatchError for one that is missing, damaged or no patch."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise PatchError(f"{path}: no such file; expected a patch that lmrepair repair wrote") from error
    except OSError as error:
        raise PatchError(f"{path}: cannot be read ({error.strerror})") from error
    _check_digest(path, raw)
    try:
        tensors = safetensors.torch.load(raw)
        length = struct.unpack("<Q", raw[:8])[0]
        record = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"][KEY])
        return _parse(record, tensors)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, IndexError) as error:
        raise PatchError(f"{path}: not a patch this version can read ({type(error).__name__}: {error})") from error


def _stamp(blank: bytes) -> bytes:
    """The file with the SHA-256 of itself, taken with 64 zeros in the digest's place, in that place."""
    place = _DIGEST.search(blank, 0, _header_end(blank))
    if place is None:
        raise PatchError("the record has no place for its digest")
    return blank[: place.start(1)] + hashlib.sha256(blank).hexdigest().encode() + blank[place.end(1) :]


def _header_end(raw: bytes) -> int:
    length: int = struct.unpack("<Q", raw[:8])[0] if len(raw) >= 8 else 0
    return 8 + min(length, HEADER_LIMIT)


def _check_digest(path: Path, raw: bytes) -> None:
    place = _DIGEST.search(raw, 0, _header_end(raw))
    if place is None:
        raise PatchError(f"{path}: not a patch (no digest in its header); expected a file that lmrepair repair wrote")
    blank = raw[: place.start(1)] + b"0" * 64 + raw[place.end(1) :]
    if hashlib.sha256(blank).hexdigest().encode() != place.group(1):
        raise PatchError(f"{path}: damaged (its digest does not match its bytes); take the patch from its source again")


def _item_out(item: Item) -> dict[str, Any]:
    return {
        "id": item.tokens.id,
        "prompt_ids": list(item.tokens.prompt),
        "target_ids": list(item.tokens.target),
        "prompt": item.prompt,
        "target": item.target,
        "repaired": item.repaired,
        "before": [list(mistake) for mistake in item.before],
        "after": [list(mistake) for mistake in item.after],
        "reason": item.reason,
    }


def _parse(record: Mapping[str, Any], tensors: dict[str, Tensor]) -> Contents:
    """The contents in a record and its tensors; ValueError, KeyError or TypeError for what does not fit."""
    if record["format"] != FORMAT:
        raise ValueError(f"format {record['format']!r}, this version reads {FORMAT}")
    model, method = record["model"], record["method"]
    layers = tuple(_text(digest) for digest in model["layers"])
    changes: dict[int, Change] = {}
    for name in sorted(tensors):
        match = re.fullmatch(r"layers\.(0|[1-9]\d{0,5})\.(columns|deltas|originals)", name)
        if match is None or int(match.group(1)) >= len(layers):
            raise ValueError(f"unexpected tensor {name!r}")
        layer = int(match.group(1))
        if layer not in changes:
            parts = (tensors[f"layers.{layer}.{part}"] for part in ("columns", "deltas", "originals"))
            changes[layer] = _checked(Change(*parts), layer)
    if not changes:
        raise ValueError("it changes nothing")
    if len({(change.originals.dtype, change.originals.shape[1]) for change in changes.values()}) > 1:
        raise ValueError("layers of different dtype or width")
    items = tuple(_item_in(item) for item in record["failures"])
    if not items:
        raise ValueError("it is for no failure")
    made = Made(
        _text(model["name"]),
        _text(method["name"]),
        dict(method["settings"]),
        dict(record["drift"]),
        dict(record["versions"]),
        dict(record.get("gate", {})),
        dict(record.get("source", {})),
    )
    return Contents(dict(sorted(changes.items())), items, made, Fingerprint(_text(model["body"]), layers))


def _checked(change: Change, layer: int) -> Change:
    columns, deltas, originals = change.columns, change.deltas, change.originals
    if columns.dtype != torch.int64 or columns.dim() != 1 or len(columns) == 0:
        raise ValueError(f"layer {layer}: columns are no list of whole numbers")
    if int(columns[0]) < 0 or bool((columns[1:] <= columns[:-1]).any()):
        raise ValueError(f"layer {layer}: columns are not sorted and unique")
    if deltas.dtype != torch.float32 or deltas.dim() != 2 or len(deltas) != len(columns):
        raise ValueError(f"layer {layer}: deltas do not fit the columns")
    if originals.dtype not in DTYPES.values() or originals.shape != deltas.shape:
        raise ValueError(f"layer {layer}: originals do not fit the deltas")
    if not bool(torch.isfinite(change.patched().float()).all()):
        raise ValueError(f"layer {layer}: values that are not finite")
    return change


def _item_in(item: Mapping[str, Any]) -> Item:
    def ids(name: str) -> tuple[int, ...]:
        if not item[name] or not all(type(token) is int and token >= 0 for token in item[name]):
            raise ValueError(f"{name} is no list of token ids")
        return tuple(item[name])

    def mistakes(name: str) -> tuple[tuple[int, int, int, float], ...]:
        return tuple((int(p), int(wanted), int(said), float(gap)) for p, wanted, said, gap in item[name])

    tokens = Tokens(_text(item["id"]), ids("prompt_ids"), ids("target_ids"))
    texts = (_text(item["prompt"]), _text(item["target"]))
    return Item(tokens, *texts, bool(item["repaired"]), mistakes("before"), mistakes("after"), _text(item["reason"]))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"found {type(value).__name__}, expected text")
    return value
