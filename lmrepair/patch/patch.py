"""Patches: changed neurons with their deltas and original values; verified, applied, taken back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lmrepair.errors import PatchError, WrongModelError
from lmrepair.failures import write_atomically
from lmrepair.model import Change, Net, Sites, Trial, fingerprint, put, same_bits, settled, take, uninterrupted
from lmrepair.patch.format import Contents, read_contents


@dataclass(frozen=True)
class Patch(Contents):
    """A repair as a value: layer → ``Change``, the failures it is for, and the model it was made for."""

    @property
    def layers(self) -> int:
        return len(self.changes)

    @property
    def neurons(self) -> int:
        return sum(len(change.columns) for change in self.changes.values())

    @property
    def size(self) -> int:
        """The size of the file this patch is saved as, in bytes."""
        return len(self.serialise())

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
        with uninterrupted():
            for layer, change in self.changes.items():
                put(net, layer, change.columns, change.originals)

    def is_applied(self, net: Net) -> bool:
        """Whether the net holds this patch (True) or is the one it was made for (False).

        Raises WrongModelError for a net that is neither.
        """
        patched = all(same_bits(take(net, layer, change.columns), change.patched()) for layer, change in self._in(net))
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
            if layer >= net.layers or not same_bits(take(net, layer, change.columns), change.originals):
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
        now = {layer: take(net, layer, change.columns) for layer, change in self.changes.items()}
        is_original = all(same_bits(now[layer], change.originals) for layer, change in self.changes.items())
        is_patched = all(same_bits(now[layer], change.patched()) for layer, change in self.changes.items())
        if not (is_patched if patched else is_original):
            if is_patched or is_original:
                raise WrongModelError("the patch is already applied" if is_patched else "the patch is not applied")
            raise WrongModelError(
                "the neurons the patch changes hold other values than it expects; is it another model?"
            )

    def save(self, path: str | Path) -> None:
        """Write the patch as one safetensors file: to a temporary file, flushed, then renamed."""
        write_atomically(Path(path), self.serialise())

    @staticmethod
    def load(path: str | Path) -> Patch:
        """Read and check a patch. Raises PatchError for a file that is missing, damaged or no patch."""
        found = read_contents(Path(path))
        return Patch(found.changes, found.items, found.made, found.fingerprint)


@dataclass(frozen=True)
class PatchSize:
    """How large a patch is: layers and neurons it changes, bytes of its file."""

    layers: int
    neurons: int
    bytes: int

    @staticmethod
    def of(patch: Patch) -> PatchSize:
        return PatchSize(patch.layers, patch.neurons, patch.size)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
