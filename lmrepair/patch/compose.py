"""Patches for one model put together, taken out again, and compared: a composed patch is a patch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations

import torch
from torch import Tensor

from lmrepair.errors import PatchError, WrongModelError
from lmrepair.model import Change, Edit, Fingerprint, LowRank, Net, Product, fingerprint, same_bits
from lmrepair.patch.format import Item, Made
from lmrepair.patch.patch import Patch

METHOD = "compose"
RESIDUE = 1e-6  # what sums and differences in float32 leave of a neuron's change that was taken out
UNKNOWN = ""  # in place of a layer's digest that only the model could give


def combine(patches: Sequence[Patch], net: Net | None = None) -> Patch:
    """One patch that does what all of them do: the deltas of neurons that several change are added.

    The order of the patches is no matter, to the bit. All must be for the same untouched model; ``net`` is that
    model, unpatched. Without it, digests of layers in which the patches change different neurons are left open
    (applying checks the changed neurons' originals there), and no layer may be changed whole by one patch and
    at all by another.

    Raises PatchError for fewer than two patches or the same one twice, WrongModelError for different models.
    """
    if len(patches) < 2:
        raise PatchError(f"{len(patches)} patch to compose; expected two or more")
    by_digest = {_digest(patch): patch for patch in patches}
    if len(by_digest) < len(patches):
        raise PatchError("the same patch twice; each is added once")
    ordered = [patch for _, patch in sorted(by_digest.items())]
    for one, other in combinations(ordered, 2):
        _refuse_other_model(one, other)
    layers = sorted({layer for patch in ordered for layer in patch.changes})
    changed = {layer: [patch.changes[layer] for patch in ordered if layer in patch.changes] for layer in layers}
    changes = {layer: _sum(some, layer, net) for layer, some in changed.items()}
    items = _items(ordered)
    settings = {"parts": {digest: _names(patch) for digest, patch in sorted(by_digest.items())}}
    made = Made(ordered[0].made.model, METHOD, settings, {}, dict(ordered[0].made.versions))
    return Patch(changes, items, made, _fingerprint(ordered, changes, net))


def without(patch: Patch, part: Patch, net: Net | None = None) -> Patch:
    """A composed patch with one of its parts taken out again, exact to one rounding in float32 where others overlap.

    ``net``, the untouched model, is needed where that part and another change a whole layer as factors. Raises
    PatchError if the composition does not have that part.
    """
    parts = dict(patch.made.settings.get("parts", {})) if patch.made.method == METHOD else {}
    if parts.pop(_digest(part), None) is None:
        raise PatchError("the composed patch has no such part; lmrepair show lists the digests of those it has")
    needed = {name for names in parts.values() for name in names}
    changes: dict[int, Edit] = {}
    for layer, change in patch.changes.items():
        taken = part.changes.get(layer)
        less = change if taken is None else _less(change, taken, layer, net)
        if less is not None:
            changes[layer] = less
    if not changes:
        raise PatchError("nothing is left of the patch without that part")
    items = tuple(item for item in patch.items if _name(item) in needed)
    made = replace(patch.made, settings={"parts": parts}, drift={})
    return Patch(changes, items, made, _fingerprint([patch], changes, net))


def _digest(patch: Patch) -> str:
    return hashlib.sha256(patch.serialise()).hexdigest()


def _names(patch: Patch) -> list[str]:
    return sorted({_name(item) for item in patch.items})


def _name(item: Item) -> str:
    """A failure by its exact ids, so that records of it in several patches are one."""
    return hashlib.sha256(f"{item.tokens.prompt} {item.tokens.target}".encode()).hexdigest()[:16]


def _refuse_other_model(one: Patch, other: Patch) -> None:
    mine, theirs = one.fingerprint, other.fingerprint
    names = f"{one.made.model!r} and {other.made.model!r}"
    if mine.body != theirs.body or len(mine.layers) != len(theirs.layers) or one.dtype != other.dtype:
        raise WrongModelError(f"the patches are for different models ({names}); only patches for one model add up")
    for layer, (a, b) in enumerate(zip(mine.layers, theirs.layers, strict=True)):
        ours, others = one.changes.get(layer), other.changes.get(layer)
        if torch.equal(_left_out(ours), _left_out(others)) and a != b and UNKNOWN not in (a, b):
            raise WrongModelError(f"the patches are for different states of {names}: layer {layer} differs")
        if isinstance(ours, Change) and isinstance(others, Change) and not _originals_agree(ours, others):
            raise WrongModelError(
                f"the patches are for different states of {names}: they found other neurons in layer {layer}; "
                "was one made on top of the other? Apply those in turn"
            )


def _originals_agree(one: Change, other: Change) -> bool:
    mine = torch.isin(one.columns, other.columns)
    theirs = torch.isin(other.columns, one.columns)
    return same_bits(one.originals[mine], other.originals[theirs])


def _sum(changes: Sequence[Edit], layer: int, net: Net | None) -> Edit:
    if len(changes) == 1:
        return changes[0]
    if all(isinstance(change, LowRank) for change in changes):
        product = reduce(Product.plus, [change.product for change in changes if isinstance(change, LowRank)])
        return LowRank.of(product, _original(net, layer))
    if any(isinstance(change, LowRank) for change in changes):
        neurons = _original(net, layer)
        changes = [change if isinstance(change, Change) else _dense(change, neurons) for change in changes]
    return _sum_of_neurons([change for change in changes if isinstance(change, Change)], layer)


def _sum_of_neurons(changes: Sequence[Change], layer: int) -> Change:
    columns = torch.cat([change.columns for change in changes]).unique()
    deltas = torch.zeros(len(columns), changes[0].width, dtype=torch.float64)
    originals = torch.zeros(deltas.shape, dtype=changes[0].dtype)
    for change in changes:
        at = torch.searchsorted(columns, change.columns)
        deltas[at] += change.deltas.double()
        originals[at] = change.originals
    made = Change(columns, deltas.float(), originals)
    if not bool(torch.isfinite(made.patched().float()).all()):
        raise PatchError(f"layer {layer}: the patches add up to values that are not finite in {originals.dtype}")
    return made


def _original(net: Net | None, layer: int) -> Tensor:
    if net is None:
        raise PatchError(
            f"layer {layer} is changed whole by one of the patches and by another too; to add these the model must "
            "be there: name it with --model"
        )
    return net.columns(layer).detach().cpu().contiguous()


def _dense(change: LowRank, neurons: Tensor) -> Change:
    return Change(change.columns, change.deltas.contiguous(), neurons)


def _less(change: Edit, part: Edit, layer: int, net: Net | None) -> Edit | None:
    if isinstance(change, LowRank) and isinstance(part, LowRank):
        product = _less_product(change.product, part.product)
        return LowRank.of(product, _original(net, layer)) if product.rank else None
    if isinstance(change, LowRank):
        raise PatchError(f"layer {layer}: the part is not what was composed")
    deltas = change.deltas.double()
    at = torch.searchsorted(change.columns, part.columns)
    deltas[at] -= part.deltas.double()
    left = deltas.float()
    least = torch.zeros(len(left))
    least[at] = RESIDUE * change.deltas[at].abs().amax(dim=1)
    kept = left.abs().amax(dim=1) > least
    if not bool(kept.any()):
        return None
    return Change(change.columns[kept], left[kept], change.originals[kept])


def _less_product(whole: Product, part: Product) -> Product:
    """The pairs of factors that are not the part's; where they cannot be told, the part is taken off as a sum."""
    rows = {tuple(row) for row in _pairs(part)}
    kept = torch.tensor([tuple(row) not in rows for row in _pairs(whole)])
    if int((~kept).sum()) == part.rank:
        return Product(whole.left[kept], whole.right[kept], whole.exponents[kept])
    return whole.plus(part.times(-1.0))


def _pairs(product: Product) -> list[list[int]]:
    return torch.cat([product.left, product.right, product.exponents[:, None]], dim=1).tolist()


def _items(patches: Sequence[Patch]) -> tuple[Item, ...]:
    """The failures of all, one record a failure; repaired if any patch repairs it."""
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], Item] = {}
    for patch in patches:
        for item in patch.items:
            key = (item.tokens.prompt, item.tokens.target)
            if key not in found or (item.repaired and not found[key].repaired):
                found[key] = item
    return tuple(found[key] for key in sorted(found, key=lambda key: (found[key].tokens.id, key)))


def _fingerprint(patches: Sequence[Patch], changes: Mapping[int, Edit], net: Net | None) -> Fingerprint:
    """The model's; without it, a layer's digest as some patch has it that leaves out the same neurons, else open."""
    if net is not None:
        return fingerprint(net, {at: one.columns for at, one in changes.items() if isinstance(one, Change)})
    layers = []
    for layer in range(len(patches[0].fingerprint.layers)):
        out = _left_out(changes.get(layer))
        known = [
            one.fingerprint.layers[layer] for one in patches if torch.equal(_left_out(one.changes.get(layer)), out)
        ]
        layers.append(next((digest for digest in known if digest != UNKNOWN), UNKNOWN))
    return replace(patches[0].fingerprint, layers=tuple(layers))


def _left_out(change: Edit | None) -> Tensor:
    """The neurons that a layer's digest leaves out."""
    return change.columns if isinstance(change, Change) else torch.zeros(0, dtype=torch.int64)


def _columns(patch: Patch, layer: int) -> Tensor:
    change = patch.changes.get(layer)
    return torch.zeros(0, dtype=torch.int64) if change is None else change.columns


@dataclass(frozen=True)
class Difference:
    """Two patches side by side in one layer: neurons in both, in one alone, norms of the deltas, and their cosine."""

    layer: int
    both: int
    first: int
    second: int
    norms: tuple[float, float]
    distance: float
    cosine: float | None


def difference(one: Patch, other: Patch) -> list[Difference]:
    """Layer by layer, what two patches change; the cosine is None where one changes nothing."""
    found = []
    for layer in sorted({*one.changes, *other.changes}):
        columns = [_columns(patch, layer) for patch in (one, other)]
        union = torch.cat(columns).unique()
        dense = [_dense_at(patch, layer, union) for patch in (one, other)]
        norms = (float(dense[0].norm()), float(dense[1].norm()))
        cosine = float((dense[0] * dense[1]).sum()) / (norms[0] * norms[1]) if all(norms) else None
        both = len(columns[0]) + len(columns[1]) - len(union)
        alone = (len(columns[0]) - both, len(columns[1]) - both)
        found.append(Difference(layer, both, *alone, norms, float((dense[0] - dense[1]).norm()), cosine))
    return found


def _dense_at(patch: Patch, layer: int, union: Tensor) -> Tensor:
    change = patch.changes.get(layer)
    made = torch.zeros(len(union), patch.width, dtype=torch.float64)
    if change is not None:
        made[torch.searchsorted(union, change.columns)] = change.deltas.double()
    return made
