"""The value optimiser: what an FFN should write at a key position so that the target follows.

A failure's key position is the last token of its prompt. Its value is searched for as a shift of the FFN
output there (arXiv 2202.05262); whatever comes later, the target's other tokens included, can see the
shift through attention alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmrepair.methods.maths import Moments, adam, lengths_behind

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lmrepair.model import Batch, Net


@dataclass(frozen=True)
class Search:
    """How values are searched for, in units that no model's scale enters.

    A shift is u times the root mean square of what the FFN writes at the key position. ``rate``: Adam's
    for u. ``decay``: weight of mean u². ``clamp``: most root mean square of u. ``essence``: weight of the
    KL of what follows the key's token without its context. ``margin``: a failure whose target is preferred
    by more, at every position, is left as it is.
    """

    steps: int
    rate: float
    decay: float
    clamp: float
    essence: float
    margin: float


@dataclass(frozen=True)
class Read:
    """At the key positions of a batch: layer → coefficients [B, m], output [B, d] and state [B, d] of one layer.

    ``states`` is the residual stream as that layer's block leaves it. ``lengths``: layer → by what the norm behind
    its FFN divides the outputs, [B], where there is one.
    """

    keys: Mapping[int, Tensor]
    lengths: Mapping[int, Tensor]
    outputs: Tensor
    states: Tensor


@dataclass(frozen=True)
class Values:
    """For each failure of a batch: the ``shifts`` [B, d], the ``states`` [B, d] after the layer with them,
    and the objective [B] without (``before``) and with (``after``) them."""

    shifts: Tensor
    states: Tensor
    before: Tensor
    after: Tensor


def key_rows(batch: Batch) -> Tensor:
    """The flat positions [B] of the prompts' last tokens, where the first target tokens are predicted."""
    import torch

    first = [int((batch.owner == index).nonzero()[0]) for index in range(len(batch.tokens))]
    return batch.rows[torch.tensor(first, device=batch.rows.device)]


def read_keys(net: Net, batch: Batch, layers: Sequence[int], top: int) -> Read:
    """One forward pass: coefficients of the layers, output and state of layer ``top``, at the key positions."""
    import torch

    rows = key_rows(batch)
    norms = {layer: norm for layer in layers if (norm := net.anatomy.behind[layer]) is not None}
    with torch.no_grad(), net.watch(sorted({*layers, top})) as watched, _states(net, top) as states:
        net.logits(batch, rows)
        flat = {layer: watched.inputs[layer].reshape(-1, net.widths[layer])[rows].float() for layer in layers}
        written = {layer: watched.outputs[layer].reshape(-1, net.hidden)[rows] for layer in {*layers, top}}
        return Read(
            {layer: z.clone() for layer, z in flat.items()},
            {layer: lengths_behind(net, norm, written[layer]) for layer, norm in norms.items()},
            written[top].float().clone(),
            states[0].reshape(-1, net.hidden)[rows].float(),
        )


def find_values(net: Net, batch: Batch, layer: int, search: Search) -> Values:
    """Adam on the shifts of all failures of a batch, each on its own, until its target is preferred.

    The objective of a failure is the mean cross-entropy of its target, with the search's other terms; of
    the shifts tried, the one that is preferred by the margin stays, else the one of least objective.
    """
    import torch

    start = read_keys(net, batch, (), layer)
    unit = start.outputs.norm(dim=1, keepdim=True) / net.hidden**0.5
    essence = _Essence.of(net, batch) if search.essence else None
    u = torch.zeros_like(start.outputs)
    best, states = u, start.states
    before = after = torch.full((len(u),), float("inf"), device=u.device)
    moments: Moments | None = None
    for step in range(search.steps + 1):
        with torch.enable_grad(), _states(net, layer) as seen:
            moved = u.clone().requires_grad_()
            objective, held = _objective(net, batch, layer, moved, unit, search, essence)
            now = objective.detach()
            better = held | (now < after)
            before = now if not step else before
            after = torch.where(better, now, after)
            best = torch.where(better[:, None], u, best)
            states = torch.where(better[:, None], seen[0].detach().reshape(-1, net.hidden)[key_rows(batch)], states)
            if step == search.steps or bool(held.all()):
                break
            (slope,) = torch.autograd.grad(objective.sum(), moved)
        moves, moments = adam({0: slope}, moments, search.rate)
        u = torch.where(held[:, None], u, u + moves[0])
        size = u.square().mean(dim=1, keepdim=True).sqrt()
        u = u * (search.clamp / size.clamp(min=search.clamp))
    return Values(best * unit, states.float(), before, after)


def _objective(
    net: Net, batch: Batch, layer: int, u: Tensor, unit: Tensor, search: Search, essence: _Essence | None
) -> tuple[Tensor, Tensor]:
    """The objective [B] with shifts u·unit, and whether each target is preferred by the margin [B]."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    from lmrepair.model import Preference

    with _shifted(net, layer, key_rows(batch), u * unit):
        logits = net.logits(batch).float()
    count = torch.bincount(batch.owner, minlength=len(batch.tokens))
    losses = F.cross_entropy(logits, batch.wanted, reduction="none")
    objective = torch.zeros(len(count), device=losses.device).index_add(0, batch.owner, losses) / count
    open_ = ~(Preference.of(logits.detach(), batch.wanted).gap < -search.margin)
    held = torch.bincount(batch.owner[open_], minlength=len(batch.tokens)) == 0
    objective = objective + search.decay * u.square().mean(dim=1)
    if essence is not None:
        with _shifted(net, layer, essence.batch.rows, (u * unit)[essence.owners]):
            after = net.logits(essence.batch).float().log_softmax(dim=1)
        kl = (essence.before.exp() * (essence.before - after)).sum(dim=1)
        objective = objective.index_add(0, essence.owners, search.essence * kl)
    return objective, held


@dataclass(frozen=True)
class _Essence:
    """The key's token without its context: first and last token of each prompt longer than that.

    ``before``: its log-probabilities [E, V] of what follows; ``owners`` [E]: whose they are.
    """

    batch: Batch
    before: Tensor
    owners: Tensor

    @staticmethod
    def of(net: Net, batch: Batch) -> _Essence | None:
        import torch

        from lmrepair.failures import Tokens

        owners = [index for index, item in enumerate(batch.tokens) if len(item.prompt) > 2]
        if not owners:
            return None
        short = []
        for index in owners:
            item = batch.tokens[index]
            short.append(Tokens(item.id, (item.prompt[0], item.prompt[-1]), item.target[:1]))
        (made,) = net.batches(short, 3 * len(short))
        with torch.no_grad():
            before = net.logits(made).float().log_softmax(dim=1)
        return _Essence(made, before, torch.tensor(owners, device=before.device))


@contextmanager
def _shifted(net: Net, layer: int, rows: Tensor, shift: Tensor) -> Iterator[None]:
    """A layer's FFN writes ``shift`` [n, d] in addition at flat positions [n]."""
    with net.altered(layer, lambda output: output.index_add(0, rows, shift.to(output.dtype))):
        yield


@contextmanager
def _states(net: Net, layer: int) -> Iterator[list[Tensor]]:
    """Collect what the block of a layer leaves in the residual stream, first pass first."""
    from torch import nn

    seen: list[Tensor] = []

    def ran(_: nn.Module, __: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).to(net.device))

    path = net.anatomy.names[layer].split(".")
    place = next(
        at for at in range(1, len(path)) if isinstance(net.model.get_submodule(".".join(path[:at])), nn.ModuleList)
    )
    block = net.model.get_submodule(".".join(path[: place + 1]))
    with ExitStack() as hooks:
        hooks.callback(block.register_forward_hook(ran).remove)
        yield seen
