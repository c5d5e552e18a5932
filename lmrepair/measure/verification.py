"""Check a saved patch on a fresh model: does it still repair what it says, and what does it change?"""

from __future__ import annotations

from dataclasses import dataclass

from lmrepair.diagnosis import Diagnosis, diagnose
from lmrepair.errors import PatchError
from lmrepair.failures import Reference
from lmrepair.measure.drift import Drift, measure_drift
from lmrepair.model import Net, Trial, greedy, put
from lmrepair.patch import Patch


@dataclass(frozen=True)
class Verification:
    """``verified``: every failure the patch calls repaired is, under teacher forcing and written freely.

    ``diagnoses``: the patched net's, in the patch's order; ``written``: whether greedy decoding gives
    the target. ``restored``: whether taking the patch back gave every changed neuron its bits again.
    """

    verified: bool
    diagnoses: tuple[Diagnosis, ...]
    written: tuple[bool, ...]
    drift: Drift
    restored: bool

    @property
    def repaired(self) -> int:
        return sum(not item.mistakes and same for item, same in zip(self.diagnoses, self.written, strict=True))


def verify(net: Net, patch: Patch, reference: Reference) -> Verification:
    """Verify a patch on the net it was made for, patched already or not; the net is left as it was given.

    Raises WrongModelError for a net the patch was not made for.
    """
    was_applied = patch.is_applied(net)
    if not was_applied:
        patch.apply(net)
    try:
        found = diagnose(net, [item.tokens for item in patch.items])
        texts = greedy(net, [item.tokens for item in found], until_wrong=True)
    finally:
        patch.revert(net)
    restored = patch.is_original(net)
    (drift,) = measure_drift(net, [patch], reference)
    if was_applied:
        patch.apply(net)
    written = tuple(text == item.tokens.target for text, item in zip(texts, found, strict=True))
    holds = all(
        not item.mistakes and same
        for claim, item, same in zip(patch.items, found, written, strict=True)
        if claim.repaired
    )
    if not any(claim.repaired for claim in patch.items):
        why = "keeps its failures to itself" if patch.made.withheld else "repairs nothing by its own record"
        raise PatchError(f"the patch {why}; there is nothing to verify")
    return Verification(holds and restored, tuple(found), written, drift, restored)


def needed_by(net: Net, patch: Patch) -> dict[int, tuple[str, ...]]:
    """Layer → ids of the failures whose repair is lost under teacher forcing where that layer alone stays untouched.

    A repair that several layers can carry needs none of them. One pass a layer; the net is left as it was given.
    Raises WrongModelError for a net the patch was not made for.
    """
    was_applied = patch.is_applied(net)
    if was_applied:
        patch.revert(net)
    repaired = [item.tokens for item in patch.items if item.repaired]
    deltas = {layer: change.delta for layer, change in patch.changes.items()}
    found = {}
    with Trial(net, patch.sites()) as trial:
        trial.write(deltas)
        held = [item.tokens for item in diagnose(net, repaired) if not item.mistakes]
        for layer, delta in deltas.items():
            put(net, layer, patch.changes[layer].columns, trial.originals[layer])
            found[layer] = tuple(item.tokens.id for item in diagnose(net, held) if item.mistakes)
            trial.write({layer: delta})
    if was_applied:
        patch.apply(net)
    return found
