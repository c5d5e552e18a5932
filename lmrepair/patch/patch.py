"""Patches: what is done to each layer and what it takes to go back; verified, applied, taken back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lmrepair.errors import PatchError, WrongModelError
from lmrepair.failures import Tokens, write_atomically
from lmrepair.model import (
    DTYPES,
    Change,
    LowRank,
    Net,
    Sites,
    Trial,
    digest,
    fingerprint,
    layer_digest,
    patched,
    put,
    same_bits,
    settled,
    take,
    uninterrupted,
)
from lmrepair.patch.format import Contents, read_contents
from lmrepair.patch.hub import fetched


@dataclass(frozen=True)
class Patch(Contents):
    """A repair as a value: layer → ``Change`` or ``LowRank``, the failures it is for, and the model it was made for."""

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
    def width(self) -> int:
        """The model's hidden width d."""
        return next(iter(self.changes.values())).width

    @property
    def mixtures(self) -> list[int]:
        """Of the layers that it changes, those that are mixtures of experts."""
        return sorted(self.changes.keys() & self.fingerprint.experts.keys())

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.changes.values())).dtype

    def apply(self, net: Net) -> None:
        """Write the patch into the net's weights, for good.

        Raises WrongModelError, before any weight is touched, unless the net is bit for bit the one the
        patch was made for; PatchError, with the weights as they were, if nothing moved.
        """
        self._fit(net, applied=False)
        # Of what was right before, the patch may move nothing; none at all where failures were withheld.
        likely = sorted(self.items, key=lambda item: not (item.before and item.repaired))
        if not any(self._moved(net, tokens) for tokens in [[item.tokens] for item in likely] or [[]]):
            raise PatchError("the patch was written but the model's logits did not move; the weights are as before")

    def _moved(self, net: Net, tokens: Sequence[Tokens]) -> bool:
        """Write the patch; where tokens are given and their logits are as they were, put the neurons back."""
        probe = net.batches(tokens)
        with Trial(net, self.sites()) as trial, settled(net.model), torch.inference_mode():
            before = [net.logits(batch) for batch in probe]
            trial.write({layer: change.delta for layer, change in self.changes.items()})
            after = [net.logits(batch) for batch in probe]
            moved = not probe or any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
            if moved:
                trial.keep()
            return moved

    def revert(self, net: Net) -> None:
        """Put the original values back, bit for bit.

        Raises WrongModelError, before any weight is touched, unless the net is bit for bit the one the
        patch was made for with this patch applied last.
        """
        originals = self._fit(net, applied=True)
        with uninterrupted():
            for layer, change in self.changes.items():
                put(net, layer, change.columns, originals[layer])

    def is_applied(self, net: Net) -> bool:
        """Whether the net holds this patch (True) or is the one it was made for (False).

        Raises WrongModelError for a net that is neither.
        """
        applied = all(self._patched(net, layer) is not None for layer in self.changes)
        self._fit(net, applied)
        return applied

    def is_original(self, net: Net) -> bool:
        """Whether the neurons that the patch changes hold, bit for bit, what they held before it."""
        return all(layer < net.layers and self._original(net, layer) for layer in self.changes)

    def factors(self, widths: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Layer → A [r, m] and B [d, r], float32, whose product B A is the change of its projection [d, m], exactly.

        ``widths``: m of every layer of the model (``Net.widths``). Where single neurons change, A picks them.
        """
        return {layer: change.factors(widths[layer]) for layer, change in self.changes.items()}

    @contextmanager
    def on(self, net: Net) -> Iterator[None]:
        """The net with this patch for the length of a ``with`` block; the weights are put back after it.

        The same checks as ``apply``, without the fingerprint: originals must match bit for bit.
        """
        for layer in self.changes:
            if layer >= net.layers or not self._original(net, layer):
                raise WrongModelError(
                    f"layer {layer} does not hold the patch's original values; it is for another state"
                )
        with Trial(net, self.sites()) as trial:
            trial.write({layer: change.delta for layer, change in self.changes.items()})
            yield

    def sites(self) -> Sites:
        return Sites({layer: change.columns for layer, change in self.changes.items()})

    def _original(self, net: Net, layer: int) -> bool:
        """Whether a layer's neurons are as they were before the patch."""
        change = self.changes[layer]
        if isinstance(change, LowRank):
            return layer_digest(net, layer) == self.fingerprint.layers[layer]
        return _fits(net, layer, change) and same_bits(take(net, layer, change.columns), change.originals)

    def _patched(self, net: Net, layer: int) -> Tensor | None:
        """What a layer's neurons were before the patch, where they are as it leaves them; else None."""
        change = self.changes[layer]
        if not _fits(net, layer, change):
            return None
        now = take(net, layer, change.columns)
        if isinstance(change, Change):
            return change.originals if same_bits(now, change.patched()) else None
        before = change.original(now)
        fits = digest(before) == self.fingerprint.layers[layer] and same_bits(patched(before, change.delta), now)
        return before if fits else None

    def _fit(self, net: Net, applied: bool) -> Mapping[int, Tensor]:
        """Check that the net is the one the patch was made for, in the state asked for.

        Returns, of one that is patched, what the changed neurons were before.
        """
        made = self.made.model
        if net.dtype != self.dtype:
            raise WrongModelError(
                f"the patch was made for {made!r} in {_name(self.dtype)}, the model is in {_name(net.dtype)}; "
                f"load it with dtype {_name(self.dtype)}"
            )
        shapes = {change.width for change in self.changes.values()}
        if net.layers != len(self.fingerprint.layers) or shapes != {net.hidden}:
            raise WrongModelError(
                f"the patch was made for {made!r} with {len(self.fingerprint.layers)} layers of width "
                f"{max(shapes)}; this model has {net.layers} of width {net.hidden}"
            )
        if not all(_fits(net, layer, change) for layer, change in self.changes.items()):
            raise WrongModelError(f"the patch was made for {made!r} with wider layers than this model has")
        largest = max((max(item.tokens.ids) for item in self.items), default=0)
        if largest >= net.anatomy.vocabulary:
            raise WrongModelError(
                f"the patch's failures have token {largest}; this model's vocabulary has {net.anatomy.vocabulary}"
            )
        whole = {layer for layer, change in self.changes.items() if isinstance(change, LowRank)}
        columns = {layer: change.columns for layer, change in self.changes.items() if layer not in whole}
        found = fingerprint(net, columns)
        if found.body != self.fingerprint.body:
            raise WrongModelError(f"the patch was made for {made!r}; the weights of this model are others")
        digests = zip(found.layers, self.fingerprint.layers, strict=True)
        other = {at for at, (now, then) in enumerate(digests) if then and now != then}  # empty: not known
        _refuse_changed(sorted(other - whole), made)
        originals = {layer for layer in self.changes if layer not in other and self._original(net, layer)}
        if not applied and len(originals) == len(self.changes):
            return {}
        before = {layer: self._patched(net, layer) for layer in self.changes}
        known = {layer: values for layer, values in before.items() if values is not None}
        if len(known) == len(self.changes):
            if applied:
                return known
            raise WrongModelError("the patch is already applied")
        if len(originals) == len(self.changes):
            raise WrongModelError("the patch is not applied")
        _refuse_changed(sorted(other - known.keys()), made)
        raise WrongModelError("the neurons the patch changes hold other values than it expects; is it another model?")

    def save(self, path: str | Path) -> None:
        """Write the patch as one safetensors file: to a temporary file, flushed, then renamed.

        Raises PatchError for weights of a dtype that no patch file holds.
        """
        if self.dtype not in DTYPES.values():
            raise PatchError(f"{path}: a patch file holds {', '.join(DTYPES)}; this patch is of {_name(self.dtype)}")
        write_atomically(Path(path), self.serialise())

    @staticmethod
    def load(path: str | Path) -> Patch:
        """Read and check a patch; ``hub:OWNER/NAME`` is one on the hub.

        Raises PatchError for a file that is missing, damaged or no patch.
        """
        found = read_contents(fetched(path))
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


@dataclass(frozen=True)
class LayerPart:
    """A layer's part of a patch: neurons, rank (of neurons: their number), norm, bytes in the file."""

    layer: int
    neurons: int
    rank: int
    norm: float
    bytes: int


def by_layer(patch: Patch) -> list[LayerPart]:
    """What a patch does to each of its layers."""
    found = []
    for layer, change in patch.changes.items():
        if isinstance(change, LowRank):
            product = change.product
            rank, held = product.rank, [product.left, product.right, product.exponents, change.residue]
        else:
            rank, held = len(change.columns), [change.columns, change.deltas, change.originals]
        size = sum(part.numel() * part.element_size() for part in held)
        norm = float(change.deltas.double().norm())
        found.append(LayerPart(layer, len(change.columns), rank, norm, size))
    return found


def _fits(net: Net, layer: int, change: Change | LowRank) -> bool:
    """Whether the layer has room for the change; a product is one of all its neurons."""
    if layer >= net.layers or change.width != net.hidden or change.dtype != net.dtype:
        return False
    width = net.widths[layer]
    return change.product.left.shape[1] == width if isinstance(change, LowRank) else int(change.columns[-1]) < width


def _refuse_changed(layers: Sequence[int], made: str) -> None:
    if layers:
        raise WrongModelError(
            f"layers {list(layers)} are not as they were when the patch was made for {made!r}; "
            "was another patch applied since? Take patches back in reverse order"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
