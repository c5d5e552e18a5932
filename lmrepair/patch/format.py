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
from lmrepair.model import DTYPES, EXPONENT, SPREAD, Change, Edit, Fingerprint, LowRank, Product

FORMATS = 1, 2  # deltas with their originals; and, since 2, factors
KEY = "lmrepair"
HEADER_LIMIT = 64 * 1024 * 1024
_COLUMNS, _FACTORS = ("columns", "deltas", "originals"), ("left", "right", "exponents", "residue")
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
    withheld: int = 0  # failures that it was made for and does not tell


def holds_patch(path: Path) -> bool:
    """Whether a file says that it is a patch; no more of it than its header is read, and nothing checked."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return size <= HEADER_LIMIT and f'"{KEY}":'.encode() in file.read(size)


@dataclass(frozen=True)
class Contents:
    """Everything a patch file holds: layer → ``Change`` or ``LowRank``, failures, how it was made, for which model."""

    changes: Mapping[int, Edit]
    items: tuple[Item, ...]
    made: Made
    fingerprint: Fingerprint

    def serialise(self) -> bytes:
        """The bytes of the file, with their digest; the same contents give the same bytes."""
        tensors = {}
        for layer, change in sorted(self.changes.items()):
            for name, tensor in _tensors(change).items():
                tensors[f"layers.{layer}.{name}"] = tensor.cpu().contiguous()
        factors = [change for change in self.changes.values() if isinstance(change, LowRank)]
        record = {
            "digest": "0" * 64,
            "format": FORMATS[bool(factors)],
            "model": {
                **({"dtype": str(factors[0].dtype).removeprefix("torch.")} if factors else {}),
                "name": self.made.model,
                "body": self.fingerprint.body,
                "layers": list(self.fingerprint.layers),
                **({"experts": _experts_out(self.fingerprint)} if self.fingerprint.experts else {}),
            },
            "method": {"name": self.made.method, "settings": dict(self.made.settings)},
            "failures": [_item_out(item) for item in self.items],
            "drift": dict(self.made.drift),
            "versions": dict(self.made.versions),
            **({"gate": dict(self.made.gate)} if self.made.gate else {}),
            **({"source": dict(self.made.source)} if self.made.source else {}),
            **({"withheld": self.made.withheld} if self.made.withheld else {}),
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
        record = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"][KEY], parse_constant=_refuse_constant)
        return _parse(record, tensors)
    except (safetensors.SafetensorError, LookupError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise PatchError(f"{path}: not a patch this version can read ({type(error).__name__}: {error})") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of a patch")


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
    if record["format"] not in FORMATS or isinstance(record["format"], bool):
        raise ValueError(f"format {record['format']!r}, this version reads {' and '.join(map(str, FORMATS))}")
    model, method = record["model"], record["method"]
    layers = tuple(_text(digest) for digest in model["layers"])
    parts: dict[int, dict[str, Tensor]] = {}
    for name in sorted(tensors):
        match = re.fullmatch(r"layers\.(0|[1-9]\d{0,5})\.([a-z]+)", name)
        if match is None or int(match.group(1)) >= len(layers):
            raise ValueError(f"unexpected tensor {name!r}")
        parts.setdefault(int(match.group(1)), {})[match.group(2)] = tensors[name]
    dtype = DTYPES[_text(model["dtype"])] if record["format"] > 1 else None
    changes = {layer: _edit(found, dtype, layer) for layer, found in sorted(parts.items())}
    if not changes:
        raise ValueError("it changes nothing")
    if len({(change.dtype, change.width) for change in changes.values()}) > 1:
        raise ValueError("layers of different dtype or width")
    items = tuple(_item_in(item) for item in record["failures"])
    withheld = record.get("withheld", 0)
    if type(withheld) is not int or withheld < 0 or (items and withheld):
        raise ValueError(f"withheld {withheld!r}")
    if not items and not withheld:
        raise ValueError("it is for no failure")
    made = Made(
        _text(model["name"]),
        _text(method["name"]),
        dict(method["settings"]),
        dict(record["drift"]),
        dict(record["versions"]),
        dict(record.get("gate", {})),
        dict(record.get("source", {})),
        withheld,
    )
    return Contents(changes, items, made, Fingerprint(_text(model["body"]), layers, _experts_in(model)))


def _experts_out(fingerprint: Fingerprint) -> dict[str, list[list[int]]]:
    return {str(at): [list(group) for group in groups] for at, groups in sorted(fingerprint.experts.items())}


def _experts_in(model: Mapping[str, Any]) -> dict[int, tuple[tuple[int, int], ...]]:
    found = {
        int(layer): tuple((count, width) for count, width in groups)
        for layer, groups in dict(model.get("experts", {})).items()
    }
    numbers = [number for groups in found.values() for group in groups for number in group]
    if not all(type(number) is int and 0 < number < 1 << 32 for number in numbers) or not all(found.values()):
        raise ValueError("experts without a number and a width")
    return found


def _tensors(change: Edit) -> dict[str, Tensor]:
    """What is kept of a change, by name."""
    if isinstance(change, LowRank):
        product = change.product
        return dict(zip(_FACTORS, (product.left, product.right, product.exponents, change.residue), strict=True))
    return dict(zip(_COLUMNS, (change.columns, change.deltas, change.originals), strict=True))


def _edit(parts: Mapping[str, Tensor], dtype: torch.dtype | None, layer: int) -> Edit:
    """A layer's change from its tensors, checked; factors are a matter of files that say a ``dtype``."""
    if set(parts) == set(_COLUMNS):
        return _checked(Change(*(parts[name] for name in _COLUMNS)), layer)
    if dtype is None or set(parts) != set(_FACTORS):
        raise ValueError(f"layer {layer}: unexpected tensors {', '.join(sorted(parts))}")
    left, right, exponents, residue = (parts[name] for name in _FACTORS)
    if any(part.dtype != torch.int16 for part in (left, right, exponents)) or residue.dtype != torch.uint8:
        raise ValueError(f"layer {layer}: factors of another type")
    if left.dim() != 2 or right.dim() != 2 or exponents.dim() != 1 or residue.dim() != 1:
        raise ValueError(f"layer {layer}: factors of another shape")
    if not 0 < len(left) == len(right) == len(exponents) or not left.shape[1] or not right.shape[1]:
        raise ValueError(f"layer {layer}: factors that do not fit each other")
    if int(exponents.max()) - int(exponents.min()) > SPREAD or int(exponents.long().abs().max()) > EXPONENT:
        raise ValueError(f"layer {layer}: exponents out of range")
    change = LowRank(Product(left, right, exponents), dtype, residue)
    places, _ = change.missed()
    if len(places) and int(places[-1]) >= left.shape[1] * right.shape[1]:
        raise ValueError(f"layer {layer}: a residue beyond the layer")
    return change


def _checked(change: Change, layer: int) -> Change:
    columns, deltas, originals = change.columns, change.deltas, change.originals
    if columns.dtype != torch.int64 or columns.dim() != 1 or len(columns) == 0:
        raise ValueError(f"layer {layer}: columns are no list of whole numbers")
    if int(columns[0]) < 0 or bool((columns[1:] <= columns[:-1]).any()):
        raise ValueError(f"layer {layer}: columns are not sorted and unique")
    if deltas.dtype != torch.float32 or deltas.dim() != 2 or len(deltas) != len(columns) or not deltas.shape[1]:
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
