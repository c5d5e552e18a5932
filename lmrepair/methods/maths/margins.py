"""Exact gradients of the margins by which tokens are preferred, as factors.

The margin of a position is the logit of the wanted token minus its best rival's. Its gradient with
respect to a layer's neurons is J = Σ_i z_i g_iᵀ [k, d], over all positions i of the failure up to its
own (earlier ones matter through attention): the coefficients z [T, k] and the slopes g [T, d] of the
margin with respect to the FFN output are kept, J is never formed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmrepair.methods.maths.tail import Tail, states_before_norm
from lmrepair.model import Batch, Net, Preference, Reading, Sites, Watched

SLOPES_AT_ONCE = 1 << 26  # numbers of slopes made by one backward pass: 256 MB in float32


@dataclass(frozen=True)
class Factors:
    """The gradients of one failure's open margins.

    ``rows`` [s]: which of the N positions; ``first``: where the failure's begin. ``inputs``: layer → z [T, k].
    ``slopes``: layer → g [s, T, d].
    """

    rows: Tensor
    first: int
    inputs: Mapping[int, Tensor]
    slopes: Mapping[int, Tensor]


@dataclass(frozen=True)
class Margins(Reading):
    """What the model prefers, and the gradients of the margins that are still open.

    ``tail``: what follows at all N positions, where the last layer alone is written to.
    """

    factors: tuple[Factors, ...] = ()
    tail: Tail | None = None


def read_margins(
    net: Net,
    batches: Sequence[Batch],
    sites: Sites,
    focus: Tensor | None,
    margin: float | None,
    choose: Callable[[Batch, Preference, slice], tuple[Tensor, Tensor]] | None = None,
    all_rivals: bool = False,
) -> Margins:
    """One forward pass over each batch, and a backward pass for as many rows as its failures have open margins.

    Open is a position in ``focus`` [N] (None: all) that is not preferred by more than ``margin``; with
    ``margin`` None, every position of the focus is. ``choose`` decides otherwise: given a batch,
    what its positions prefer and which slice of the N they are, it says which are open, and which of
    them to read gradients of. With ``all_rivals``, gradients are those of wanted logit − log Σ exp(other logits)
    instead of the margin over the best rival: a change along them holds down the next rivals too.
    """
    preferences: list[Preference] = []
    factors: list[Factors] = []
    tails: list[Tail] = []
    last = net.layers - 1
    done = True
    at = 0
    for batch in _apart(net, batches):
        part = slice(at, at + len(batch.rows))
        at += len(batch.rows)
        with torch.enable_grad(), net.watch(sites.layers) as watched, states_before_norm(net) as before:
            logits, states = net.logits_and_states(batch)
            with torch.no_grad():
                preference = Preference.of(logits, batch.wanted)
            preferences.append(preference)
            if before and sites.layers == (last,):
                z = watched.inputs[last].detach().reshape(-1, net.widths[last])[batch.rows]
                kept = z.index_select(1, sites.columns[last].to(z.device)).float()
                state, made = (part.reshape(-1, net.hidden)[batch.rows] for part in (before[-1], watched.outputs[last]))
                tails.append(Tail(net, state, made.detach(), kept, batch.wanted))
            rows = torch.ones_like(preference.gap, dtype=torch.bool) if focus is None else focus[part]
            if margin is not None:
                opened, read = choose(batch, preference, part) if choose else (~(preference.gap < -margin),) * 2
                done = done and not bool((rows & opened).any())
                rows = rows & read
            else:
                done = False
            if not bool(rows.any()):
                continue
            value = ahead(logits.float(), batch.wanted, None if all_rivals else preference.rival)
            # No row's logits depend on another row's state, so one pass gives all of these.
            (slope,) = torch.autograd.grad(value.sum(), states, retain_graph=True)
            factors += _factors(net, sites, batch, watched, rows, states, slope, part.start)
    joint = Preference.join(preferences)
    return Margins(joint, done, factors=tuple(factors), tail=Tail.join(tails) if tails and not done else None)


def ahead(logits: Tensor, wanted: Tensor, rival: Tensor | None) -> Tensor:
    """By how much wanted tokens [N] are ahead of a rival each, or (None) of all others together, from logits [N, V]."""
    chosen = logits.gather(1, wanted[:, None])
    if rival is not None:
        return (chosen - logits.gather(1, rival[:, None])).squeeze(1)
    return chosen.squeeze(1) - logits.scatter(1, wanted[:, None], float("-inf")).logsumexp(dim=1)


def _apart(net: Net, batches: Sequence[Batch]) -> list[Batch]:
    """On a CPU, failures one by one: side by side, all go through as many passes as the one that needs most."""
    if net.device.type != "cpu":
        return list(batches)
    return net.batches([tokens for batch in batches for tokens in batch.tokens], at_once=1)


def _factors(
    net: Net, sites: Sites, batch: Batch, watched: Watched, rows: Tensor, states: Tensor, slope: Tensor, first: int
) -> list[Factors]:
    """The factors of a batch's failures, whose N positions begin with number ``first``: of its ``rows``, a mask [N],
    from the ``slope`` of each margin with respect to its own one of the ``states``.
    """
    owned = [(rows & (batch.owner == index)).nonzero().squeeze(1) for index in range(len(batch.tokens))]
    outputs = [watched.outputs[layer] for layer in sites.layers]
    if sites.layers == (net.layers - 1,):
        joined = _at_own(batch, owned, slope, states, outputs[0])
    else:
        joined = _passes(owned, slope, states, outputs, not net.runs_in_shards)
    inputs = {layer: watched.inputs[layer].detach() for layer in sites.layers}
    found = []
    for index, own in enumerate(owned):
        if not len(own):
            continue
        length = int(batch.rows[own[-1]]) - index * batch.ids.shape[1] + 1  # a causal model: no later position matters
        places = {layer: sites.columns[layer].to(states.device) for layer in sites.layers}
        found.append(
            Factors(
                own + first,
                first + int((batch.owner < index).sum()),
                {layer: inputs[layer][index, :length].index_select(1, places[layer]).float() for layer in sites.layers},
                {
                    layer: part[: len(own), index, :length].float().clone()
                    for layer, part in zip(sites.layers, joined, strict=True)
                },
            )
        )
    return found


def _passes(
    owned: Sequence[Tensor], slope: Tensor, states: Tensor, outputs: Sequence[Tensor], batched: bool
) -> list[Tensor]:
    """For each layer, slopes [turns, B, T, d]: turn r is about the r-th open row of every failure.

    Failures share no positions, so their first open rows go into one backward pass, their second into the next;
    ``batched``, many passes run as one, which shards do not know.
    """
    turns = max(len(own) for own in owned)
    together = max(1, SLOPES_AT_ONCE // sum(output.numel() for output in outputs)) if batched else 1
    slopes: list[list[Tensor]] = [[] for _ in outputs]
    for begin in range(0, turns, together):
        count = min(together, turns - begin)
        seeds = torch.zeros(count, *states.shape, dtype=states.dtype, device=states.device)
        for own in owned:
            for turn, row in enumerate(own[begin : begin + count].tolist()):
                seeds[turn, 0, row] = slope[0, row]
        made = torch.autograd.grad(
            states,
            outputs,
            grad_outputs=seeds if batched else seeds[0],
            is_grads_batched=batched,
            retain_graph=begin + count < turns,
        )
        for kept, part in zip(slopes, made, strict=True):
            kept.append(part if batched else part[None])
    return [torch.cat(parts) for parts in slopes]


def _at_own(batch: Batch, owned: Sequence[Tensor], slope: Tensor, states: Tensor, output: Tensor) -> list[Tensor]:
    """The same for the last layer: behind it no position sees another, so one backward pass has all slopes."""
    (made,) = torch.autograd.grad(states, output, grad_outputs=slope)
    flat = made.reshape(-1, made.shape[-1])
    slopes = torch.zeros(max(len(own) for own in owned), *flat.shape, dtype=flat.dtype, device=flat.device)
    for own in owned:
        places = batch.rows[own]
        slopes[torch.arange(len(own), device=places.device), places] = flat[places]
    return [slopes.reshape(-1, *made.shape)]
