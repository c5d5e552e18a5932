"""Patches: changed neurons with their deltas and original values; saved, verified, applied, taken back.

The file is described field by field in docs/patch-format.md. This is the one module that writes weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import struct
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lmrepair.errors import PatchError, WrongModelError
from lmrepair.failures import Tokens
from lmrepair.fingerprint import Fingerprint, fingerprint
from lmrepair.net import DTYPES, Net, Sites, settled

FORMAT = 1
KEY = "lmrepair"
HEADER_LIMIT = 64 * 1024 * 1024
_DIGEST = re.compile(rb'\\"digest\\":\\"([0-9a-f]{64})\\"')
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Change:
    """One layer's part: neuron indices [k] (int64, sorted), deltas [k, d] (float32), originals [k, d]."""

    columns: Tensor
    deltas: Tensor
    originals: Tensor

    def patched(self) -> Tensor:
        """The neurons as the patch leaves them: summed in float32, rounded once to the model's dtype."""
        return (self.originals.float() + self.deltas).to(self.originals.dtype)


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
    """How a patch came about: model, method with its settings, and what the reference text showed."""

    model: str
    method: str
    settings: Mapping[str, Any]
    drift: Mapping[str, Any]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Patch:
    """A repair as a value: layer → ``Change``, the failures it is for, and the model it was made for."""

    changes: Mapping[int, Change]
    items: tuple[Item, ...]
    made: Made
    fingerprint: Fingerprint

    @property
    def layers(self) -> int:
        return len(self.changes)

    @property
    def neurons(self) -> int:
        return sum(len(change.columns) for change in self.changes.values())

    @property
    def size(self) -> int:
        """The size of the file this patch is saved as, in bytes."""
        return len(self._serialise())

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.changes.values())).originals.dtype

    def apply(self, net: Net) -> None:
        """Write the patch into the net's weights, for good.

        Raises WrongModelError, before any weight is touched, unless the net is bit for bit the one the
        patch was made for; PatchError, with the weights as they were, if nothing moved.
        """
        self._fit(net, patched=False)
        probe = net.batches([item.tokens for item in self.items[:1]])
        with Trial(net, self.sites()) as trial, settled(net.model), torch.inference_mode():
            before = [net.logits(batch) for batch in probe]
            trial.write({layer: change.deltas for layer, change in self.changes.items()})
            after = [net.logits(batch) for batch in probe]
            if all(torch.equal(old, new) for old, new in zip(before, after, strict=True)):
                raise PatchError("the patch was written but the model's logits did not move; the weights are as before")
            trial.keep()

    def revert(self, net: Net) -> None:
        """Put the original values back, bit for bit.

        Raises WrongModelError, before any weight is touched, unless the net is bit for bit the one the
        patch was made for with this patch applied last.
        """
        self._fit(net, patched=True)
        with _uninterrupted():
            for layer, change in self.changes.items():
                _put(net, layer, change.columns, change.originals)

    def is_applied(self, net: Net) -> bool:
        """Whether the net holds this patch (True) or is the one it was made for (False).

        Raises WrongModelError for a net that is neither.
        """
        patched = all(_same(_take(net, layer, change.columns), change.patched()) for layer, change in self._in(net))
        self._fit(net, patched)
        return patched

    def _in(self, net: Net) -> list[tuple[int, Change]]:
        """The changes that a net has room for; ``_fit`` says what is wrong with it where that is not all."""
        return [
            (layer, change)
            for layer, change in self.changes.items()
            if layer < net.layers and int(change.columns[-1]) < net.widths[layer]
        ]

    @contextmanager
    def on(self, net: Net) -> Iterator[None]:
        """The net with this patch for the length of a ``with`` block; the weights are put back after it.

        The same checks as ``apply``, without the fingerprint: originals must match bit for bit.
        """
        for layer, change in self.changes.items():
            if layer >= net.layers or not _same(_take(net, layer, change.columns), change.originals):
                raise WrongModelError(
                    f"layer {layer} does not hold the patch's original values; it is for another state"
                )
        with Trial(net, self.sites()) as trial:
            trial.write({layer: change.deltas for layer, change in self.changes.items()})
            yield

    def sites(self) -> Sites:
        return Sites({layer: change.columns for layer, change in self.changes.items()})

    def _fit(self, net: Net, patched: bool) -> None:
        """Check that the net is the one the patch was made for, in the state asked for."""
        made = self.made.model
        if net.dtype != self.dtype:
            raise WrongModelError(
                f"the patch was made for {made!r} in {_name(self.dtype)}, the model is in {_name(net.dtype)}; "
                f"load it with dtype {_name(self.dtype)}"
            )
        shapes = {layer: change.originals.shape[1] for layer, change in self.changes.items()}
        if net.layers != len(self.fingerprint.layers) or any(width != net.hidden for width in shapes.values()):
            raise WrongModelError(
                f"the patch was made for {made!r} with {len(self.fingerprint.layers)} layers of width "
                f"{next(iter(shapes.values()))}; this model has {net.layers} of width {net.hidden}"
            )
        if any(int(change.columns[-1]) >= net.widths[layer] for layer, change in self.changes.items()):
            raise WrongModelError(f"the patch was made for {made!r} with wider layers than this model has")
        found = fingerprint(net, self.sites().columns)
        if found.body != self.fingerprint.body:
            raise WrongModelError(f"the patch was made for {made!r}; the weights of this model are others")
        other = [at for at, (a, b) in enumerate(zip(found.layers, self.fingerprint.layers, strict=True)) if a != b]
        if other:
            raise WrongModelError(
                f"layers {other} are not as they were when the patch was made for {made!r}; "
                "was another patch applied since? Take patches back in reverse order"
            )
        self._fit_columns(net, patched)

    def _fit_columns(self, net: Net, patched: bool) -> None:
        now = {layer: _take(net, layer, change.columns) for layer, change in self.changes.items()}
        is_original = all(_same(now[layer], change.originals) for layer, change in self.changes.items())
        is_patched = all(_same(now[layer], change.patched()) for layer, change in self.changes.items())
        if not (is_patched if patched else is_original):
            if is_patched or is_original:
                raise WrongModelError("the patch is already applied" if is_patched else "the patch is not applied")
            raise WrongModelError(
                "the neurons the patch changes hold other values than it expects; is it another model?"
            )

    def save(self, path: str | Path) -> None:
        """Write the patch as one safetensors file: to a temporary file, flushed, then renamed."""
        write_atomically(Path(path), self._serialise())

    def _serialise(self) -> bytes:
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
        }
        text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
        blank = safetensors.torch.save(tensors, {KEY: text})
        return _stamp(blank)

    @staticmethod
    def load(path: str | Path) -> Patch:
        """Read and check a patch. Raises PatchError for a file that is missing, damaged or no patch."""
        path = Path(path)
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


class Trial:
    """Neurons under edit: ``with Trial(net, sites) as trial`` puts their original bits back unless kept.

    Deltas are always the whole change since the start, [k, d] float32; the weights are set to
    cast(original + delta), so that steps too small for the weights' dtype add up.
    """

    def __init__(self, net: Net, sites: Sites) -> None:
        self.net, self.sites = net, sites
        self.originals = {layer: _take(net, layer, columns) for layer, columns in sites.columns.items()}
        self._kept = False

    def __enter__(self) -> Trial:
        return self

    def write(self, deltas: Mapping[int, Tensor]) -> None:
        """Set the neurons to original + delta, layer → [k, d]; layers not named keep what they have."""
        for layer, delta in deltas.items():
            original = self.originals[layer]
            _put(self.net, layer, self.sites.columns[layer], (original.float() + delta).to(original.dtype))

    def keep(self) -> None:
        """Leave the weights as they are now when the block ends without an error."""
        self._kept = True

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if self._kept and kind is None:
            return
        with _uninterrupted():
            for layer, original in self.originals.items():
                _put(self.net, layer, self.sites.columns[layer], original)

    def changes(self, deltas: Mapping[int, Tensor]) -> dict[int, Change]:
        """The neurons that the deltas really change, layer by layer, on the CPU."""
        found = {}
        for layer, delta in sorted(deltas.items()):
            original = self.originals[layer]
            moved = ~_equal_bits((original.float() + delta).to(original.dtype), original).all(dim=1)
            if bool(moved.any()):
                columns = self.sites.columns[layer].to(moved.device)[moved]
                parts = (columns, delta[moved].float(), original[moved])
                found[layer] = Change(*(part.detach().cpu().contiguous() for part in parts))
        return found


def _take(net: Net, layer: int, columns: Tensor) -> Tensor:
    neurons = net.columns(layer)
    return neurons.index_select(0, columns.to(neurons.device))


def _put(net: Net, layer: int, columns: Tensor, values: Tensor) -> None:
    neurons = net.columns(layer)
    values = values.to(neurons.device)
    with torch.no_grad():
        if len(columns) == len(neurons):
            neurons.copy_(values)
        else:
            neurons.index_copy_(0, columns.to(neurons.device), values)


def _equal_bits(one: Tensor, other: Tensor) -> Tensor:
    kind = _BITS[one.element_size()]
    return one.contiguous().view(kind) == other.contiguous().to(one.device).view(kind)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same, bit for bit."""
    return one.shape == other.shape and one.dtype == other.dtype and bool(_equal_bits(one, other).all())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold a Ctrl-C back until the block is done (only the main thread receives one)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pending.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pending and callable(before):
            before(*pending[0])


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, and flush it and its folder to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            mask = os.umask(0)
            os.umask(mask)
            os.fchmod(file.fileno(), 0o666 & ~mask)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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


def _parse(record: Mapping[str, Any], tensors: dict[str, Tensor]) -> Patch:
    """The patch in a record and its tensors; ValueError, KeyError or TypeError for what does not fit."""
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
    )
    return Patch(dict(sorted(changes.items())), items, made, Fingerprint(_text(model["body"]), layers))


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
