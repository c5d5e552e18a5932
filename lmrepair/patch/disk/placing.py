"""Which tensors of a checkpoint a patch is about: told by their contents, so that no name has to be known.

A layer's tensor is the one that holds the patch's original (or patched) neurons bit for bit, and whose
other neurons have the digest that the patch was made with.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lmrepair.errors import ModelError, WrongModelError
from lmrepair.model import Change, Edit, LowRank, patched as patch_values, same_bits
from lmrepair.patch.disk.stored import Checkpoint, Stored, numbered
from lmrepair.patch.patch import Patch

PART = 1 << 24  # bytes turned to neuron-major and hashed at once


@dataclass(frozen=True)
class Placed:
    """A layer's FFN output projection on the disk; ``rows``: a neuron is a row (Conv1D), not a column (Linear)."""

    stored: Stored
    rows: bool

    def read(self, path: Path | None = None) -> Tensor:
        """Its neurons, a view [m, d] of the matrix in memory; ``path``: read from that file, in the same place."""
        with (path or self.stored.file).open("rb") as file:
            return self.neurons(self.stored.read(file))

    def neurons(self, matrix: Tensor) -> Tensor:
        return matrix if self.rows else matrix.T

    def may_hold(self, columns: Tensor, values: Tensor) -> bool:
        """Whether the neurons ``columns`` are ``values`` [k, d], as far as one row of the matrix says."""
        with self.stored.file.open("rb") as file:
            if self.rows:
                return same_bits(self.stored.row(file, int(columns[0])), values[0])
            return same_bits(self.stored.row(file, 0)[columns], values[:, 0].contiguous())


class OtherDtypeError(ModelError):
    """The checkpoint stores its projections in another dtype than the patch was made in."""


def place(checkpoint: Checkpoint, patch: Patch, patched: bool) -> dict[int, Placed]:
    """Dense layer → its tensor, checked whole: bit for bit the model the patch was made for, in the state asked for.

    Raises OtherDtypeError where matrices of the right shape exist in another dtype only, WrongModelError for
    any other model or state. One matrix at a time is in memory.
    """
    dense = [layer for layer in patch.changes if layer not in patch.fingerprint.experts]
    if not dense:
        return {}
    shaped = {layer: _of_shape(checkpoint, patch, layer) for layer in dense}
    found = {layer: _holding(some, patch, layer, patched) for layer, some in shaped.items()}
    if not all(found.values()):
        if all(_holding(some, patch, layer, not patched) for layer, some in shaped.items()):
            raise WrongModelError("the patch is not applied" if patched else "the patch is already applied")
        raise WrongModelError(
            f"{checkpoint.folder}: the neurons the patch changes hold other values than it expects "
            f"(it was made for {patch.made.model!r}); is it another model, or was another patch applied since?"
        )
    wanted = patch.fingerprint.layers
    same = {layer: [one for one, rest in some if wanted[layer] in ("", rest)] for layer, some in found.items()}
    _refuse_changed([layer for layer, some in same.items() if not some], patch)
    chosen = _told_apart(same)
    _refuse_changed(_out_of_line(checkpoint, chosen), patch)
    _refuse_other_layers(checkpoint, patch, chosen)
    return chosen


def _refuse_changed(layers: Sequence[int], patch: Patch) -> None:
    if layers:
        raise WrongModelError(
            f"layers {list(layers)} are not as they were when the patch was made for {patch.made.model!r}; "
            "was another patch applied since? Take patches back in reverse order"
        )


def _out_of_line(checkpoint: Checkpoint, chosen: Mapping[int, Placed]) -> list[int]:
    """Layers found under another name than most, though there is a tensor with the name that most have."""
    names = Counter(pattern(placed.stored.name, layer) for layer, placed in chosen.items())
    usual, count = names.most_common(1)[0]
    if 2 * count <= len(chosen):
        return []
    wanted = {layer: usual.replace("*", str(layer)) for layer in chosen}
    return [at for at, name in wanted.items() if name != chosen[at].stored.name and name in checkpoint.tensors]


def _of_shape(checkpoint: Checkpoint, patch: Patch, layer: int) -> list[Placed]:
    change = patch.changes[layer]
    hidden, last = change.width, int(change.columns[-1])
    whole = isinstance(change, LowRank)  # then it is of all the layer's neurons
    shaped = [
        Placed(stored, rows)
        for stored in checkpoint.tensors.values()
        if len(stored.shape) == 2
        for rows in (False, True)
        if stored.shape[rows] == hidden
        and (stored.shape[not rows] == last + 1 if whole else stored.shape[not rows] > last)
    ]
    if not shaped:
        raise WrongModelError(
            f"{checkpoint.folder}: no matrix of width {hidden} with more than {last} neurons; the patch was made for "
            f"{patch.made.model!r}"
        )
    found = [placed for placed in shaped if placed.stored.torch_dtype == patch.dtype]
    if not found:
        stored = Counter(placed.stored.dtype for placed in shaped).most_common(1)[0][0]
        raise OtherDtypeError(
            f"the patch was made for {patch.made.model!r} in {_name(patch.dtype)}, {checkpoint.folder} stores {stored}"
        )
    return found


def _holding(candidates: Sequence[Placed], patch: Patch, layer: int, patched: bool) -> list[tuple[Placed, str]]:
    """The candidates that are in a state, each with its digest: of the neurons that stay, or of the whole before it.

    A change of single neurons is told by these; one of a whole layer by its digest, so that those whose names have
    the layer's number come first and the others only where none of these fits.
    """
    change = patch.changes[layer]
    if isinstance(change, Change):
        values = change.patched() if patched else change.originals
        likely = [placed for placed in candidates if placed.may_hold(change.columns, values)]
        found = [(placed, state_digest(change, placed.read(), patched)) for placed in likely]
        return [(placed, digest) for placed, digest in found if digest is not None]
    numbers = [layer in numbered(placed.stored.name) for placed in candidates]
    for turn in (True, False):
        some = [placed for placed, has in zip(candidates, numbers, strict=True) if has == turn]
        fitting = [
            (placed, patch.fingerprint.layers[layer])
            for placed in some
            if state_digest(change, placed.read(), patched) == patch.fingerprint.layers[layer]
        ]
        if fitting:
            return fitting
    return []


def state_digest(change: Edit, neurons: Tensor, patched: bool) -> str | None:
    """The digest of neurons [m, d] that a fingerprint has of their layer; None where they are not in that state."""
    if isinstance(change, Change):
        values = change.patched() if patched else change.originals
        return digest_without(neurons, change.columns) if same_bits(neurons[change.columns], values) else None
    if not patched:
        return digest_without(neurons, torch.zeros(0, dtype=torch.int64))
    state = hashlib.sha256(f"{neurons.dtype} {tuple(neurons.shape)}".encode())
    for some, part in change.parts(_at_once(neurons)):
        now = neurons[some].contiguous()
        before = part.original(now)
        if not same_bits(patch_values(before, part.delta), now):
            return None
        state.update(before.contiguous().view(torch.uint8).numpy().data)
    return state.hexdigest()


def write(change: Edit, neurons: Tensor, revert: bool) -> None:
    """Set neurons [m, d] in memory to what a change makes of them, or to what they were before it."""
    if isinstance(change, Change):
        neurons[change.columns] = change.originals if revert else change.patched()
        return
    for some, part in change.parts(_at_once(neurons)):
        now = neurons[some].contiguous()
        neurons[some] = part.original(now) if revert else patch_values(now, part.delta)


def _at_once(neurons: Tensor) -> int:
    return max(1, PART // (neurons.shape[1] * 8))  # float64 on the way


def digest_without(neurons: Tensor, columns: Tensor) -> str:
    """SHA-256 of neurons [m, d] without some, as a patch's fingerprint has it; a part at a time."""
    kept = torch.ones(len(neurons), dtype=torch.bool)
    kept[columns] = False
    left = kept.nonzero().squeeze(1)
    width = neurons.shape[1]
    state = hashlib.sha256(f"{neurons.dtype} {(len(left), width)}".encode())
    for part in left.split(max(1, PART // (width * neurons.element_size()))):
        state.update(neurons[part].contiguous().view(torch.uint8).numpy().data)
    return state.hexdigest()


def _told_apart(found: Mapping[int, list[Placed]]) -> dict[int, Placed]:
    """One tensor a layer. Twins (a head that starts as a copy of a layer) are told apart by their names' numbers."""
    patterns = Counter(pattern(one.stored.name, layer) for layer, some in found.items() for one in some)
    chosen = {}
    for layer, some in found.items():
        left = [one for one in some if layer in numbered(one.stored.name)] or some
        if len(left) > 1:
            most = max(patterns[pattern(one.stored.name, layer)] for one in left)
            left = [one for one in left if patterns[pattern(one.stored.name, layer)] == most]
        if len(left) > 1:
            names = ", ".join(one.stored.name for one in left)
            raise ModelError(f"{names} hold the same, and the patch's layer {layer} could be any of them; expected one")
        chosen[layer] = left[0]
    return chosen


def pattern(name: str, layer: int) -> str:
    """A tensor's name with a star in the place of its layer's number."""
    return ".".join("*" if part == str(layer) else part for part in name.split("."))


def _refuse_other_layers(checkpoint: Checkpoint, patch: Patch, chosen: Mapping[int, Placed]) -> None:
    """Check the projections that the patch leaves alone too, where their names follow from the others'."""
    for layer, placed in untouched(checkpoint, patch, chosen).items():
        if placed.stored.torch_dtype != patch.dtype or not patch.fingerprint.layers[layer]:
            continue
        if digest_without(placed.read(), torch.arange(0)) != patch.fingerprint.layers[layer]:
            _refuse_changed([layer], patch)


def untouched(checkpoint: Checkpoint, patch: Patch, chosen: Mapping[int, Placed]) -> dict[int, Placed]:
    """The FFN output projections of the layers that the patch does not change, by the names of those that it does."""
    names = {pattern(placed.stored.name, layer) for layer, placed in chosen.items()}
    found = {}
    if len(names) == 1:
        (name,) = names
        rows = next(iter(chosen.values())).rows
        for layer in set(range(len(patch.fingerprint.layers))) - {*chosen, *patch.fingerprint.experts}:
            stored = checkpoint.tensors.get(name.replace("*", str(layer)))
            if stored is not None and len(stored.shape) == 2:
                found[layer] = Placed(stored, rows)
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
