"""Which part of each block is its FFN, by what it reads, what reads it, and a proof.

It is the matrix that (1) writes the hidden width, (2) is added to the residual stream, position by position,
without another matrix in between, and (3) is fed position by position: on every way from the stream to its
input, a nudge at one position arrives there and nowhere else, where attention would spread it. Or it is the
mixture of experts that (2) is added to the stream and (3) reads it and writes, at a nudged position alone.
Among several, the one with the most coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lmrepair.errors import ModelError
from lmrepair.model.anatomy.probe import (
    LENGTH,
    NUDGE,
    POSITION,
    Change,
    Probe,
    Runs,
    by_position,
    changed,
    nudge,
    pattern,
)
from lmrepair.model.anatomy.stacks import Place, Stack

EXACT, ROUNDED = 1e-3, 5e-2  # what a proof may be off, in shares of the largest change: float32, half precision


@dataclass(frozen=True)
class _Block:
    """One block: its parts by name, and the groups of them that read the same values."""

    where: str
    module: nn.Module
    parts: Mapping[str, nn.Module]
    groups: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class _Reach:
    """What a group reaches at once when it is nudged: part → positions; the block's output → positions."""

    inputs: Mapping[str, list[int] | None]
    output: list[int] | None


def ffns(probe: Probe, stack: str, modules: Sequence[nn.Module], hidden: int) -> list[Place]:
    """The FFN of each block. Raises ModelError where there is no single one."""
    blocks = [_block(probe, f"{stack}.{at}", module) for at, module in enumerate(modules)]
    reached: list[list[_Reach]] = [[] for _ in blocks]
    for turn in range(max(len(block.groups) for block in blocks)):
        changes = {part: change for block in blocks for part, change in _nudged(block, turn).items()}
        runs = probe.rerun(modules, changes, held=True)
        for block, mine in zip(blocks, reached, strict=True):
            mine.append(_reach(probe, block, runs))
    runs = probe.rerun(modules, {}, held=True, stream=nudge)
    found = []
    for block, reach in zip(blocks, reached, strict=True):
        names = _candidates(probe, block, reach, _reach(probe, block, runs), runs, hidden)
        found.append(_widest(block, [_place(probe, block, name) for name in names], hidden))
    stored = [stack.at for place in found for stack in place.stacks]
    if len(set(stored)) < len(stored):
        raise ModelError("layers share one FFN output projection; expected one of its own in each layer")
    _prove(probe, modules, found)
    return found


def _place(probe: Probe, block: _Block, name: str) -> Place:
    part = block.parts[name]
    if part in probe.routed:
        return probe.routed[part].place
    path = f"{block.where}.{name}"
    return Place(
        part, path, (Stack(part, "weight", f"{path}.weight", isinstance(part, Conv1D), probe.owners.get(part)),)
    )


def _block(probe: Probe, where: str, module: nn.Module) -> _Block:
    parts = probe.parts[module]
    if any(by_position(probe.clean[part][0].given) is None for part in parts.values()):
        raise ModelError(
            f"{where}: some matrices do not see every token, and are no experts whose outputs, times a weight, add up; "
            "expected a dense FFN or a mixture of experts"
        )
    groups: list[list[str]] = []
    for name, part in parts.items():
        given = probe.clean[part][0].given
        for group in groups:
            if _same(given, probe.clean[parts[group[0]]][0].given):
                group.append(name)
                break
        else:
            groups.append([name])
    return _Block(where, module, parts, tuple(map(tuple, groups)))


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and torch.equal(one, other))


def _nudged(block: _Block, turn: int) -> dict[nn.Module, Change]:
    # Each with a phase of its own, so that what is subtracted or divided does not cancel.
    names = block.groups[turn] if turn < len(block.groups) else ()
    return {block.parts[name]: partial(nudge, phase=float(at)) for at, name in enumerate(names)}


def _reach(probe: Probe, block: _Block, runs: Runs) -> _Reach:
    inputs = {
        name: changed(runs[part][0].given, probe.clean[part][0].given)
        for name, part in block.parts.items()
        if part in runs
    }
    return _Reach(inputs, changed(runs[block.module][0].made, probe.clean[block.module][0].made))


def _candidates(
    probe: Probe, block: _Block, reach: Sequence[_Reach], stream: _Reach, streamed: Runs, hidden: int
) -> list[str]:
    """Names of the parts that write to the residual stream and are fed position by position.

    ``reach`` tells what the block's groups reach, and behind them what those of other blocks do: keys and
    values that layers share.
    """

    def pointwise(name: str, above: frozenset[str]) -> bool:
        feeders = [at for at, mine in enumerate(reach) if mine.inputs.get(name) != []]
        for at in feeders:
            if at >= len(block.groups) or reach[at].inputs.get(name) != [POSITION]:
                return False
            # What reads the stream is fed by all that wrote to it before: what lies behind is no part of the FFN.
            group = frozenset(block.groups[at])
            reads = stream.inputs.get(block.groups[at][0])
            if not reads and (group <= above or not all(pointwise(part, above | group) for part in group)):
                return False
        return bool(feeders)

    found = []
    for at, group in enumerate(block.groups):
        for name in group:
            part = block.parts[name]
            if part not in probe.routed or not stream.inputs.get(name) == [POSITION] == reach[at].output:
                continue
            if changed(streamed[part][0].made, probe.clean[part][0].made) == [POSITION]:
                found.append(name)
        calls = probe.clean[block.parts[group[0]]]
        alone = len(group) == len(calls) == 1 and calls[0].made.shape[-1] == hidden
        dense = alone and block.parts[group[0]] not in probe.routed
        if dense and reach[at].output == [POSITION] and pointwise(group[0], frozenset(group)):
            found.append(group[0])
    return found


def _widest(block: _Block, places: Sequence[Place], hidden: int) -> Place:
    widest = [place for place in places if place.width == max(place.width for place in places)]
    if len(widest) != 1:
        raise ModelError(
            f"{block.where} has {len(widest)} candidates for its FFN "
            f"({', '.join(place.name for place in widest) or 'none'}); expected exactly one matrix, or one mixture of "
            f"experts, that writes width {hidden} to the residual stream and is fed position by position. "
            "State-space blocks are not supported"
        )
    return widest[0]


def _prove(probe: Probe, modules: Sequence[nn.Module], places: Sequence[Place]) -> None:
    """Raise ModelError unless changed columns show as coefficient × change, at every position, and nowhere else.

    The blocks' outputs with one column of each projection (of each expert that the text was sent to) changed must
    be those with coefficient × change added to what the untouched FFN puts out, whatever follows it in the block;
    so must all that the block's other parts are given.
    """
    tried = [_tried(probe, place) for place in places]
    kept = [place.take(columns) for place, (columns, _, _) in zip(places, tried, strict=True)]
    try:
        for place, (columns, _, moves), before in zip(places, tried, kept, strict=True):
            place.put(columns, before + moves.to(before.dtype))
        real = [
            place.take(columns).float() - before.float()
            for place, (columns, _, _), before in zip(places, tried, kept, strict=True)
        ]
        written = probe.rerun(modules, {}, held=False)
    finally:
        for place, (columns, _, _), before in zip(places, tried, kept, strict=True):
            place.put(columns, before)
    added = {
        place.module: partial(_added, coefficients @ moves)
        for place, (_, coefficients, _), moves in zip(places, tried, real, strict=True)
    }
    told = probe.rerun(modules, added, held=False)
    for place, block in zip(places, modules, strict=True):
        runs = (probe.clean, written, told)
        before, once, twice = (run[block][0].made for run in runs)
        shows = [_as_told(before, once, twice, probe.clean[block][0].given)]
        shows += [_as_told(*(run[part][0].given for run in runs)) for part in probe.parts[block].values()]
        if not all(shows) or torch.equal(written[block][0].made, probe.clean[block][0].made):
            raise ModelError(
                f"{place.name} cannot be proved to be the block's FFN output projection: a change of its columns "
                "does not show as coefficient × change in what the block puts out; expected weights that nothing "
                "else reads and that are the ones that run"
            )


def _tried(probe: Probe, place: Place) -> tuple[Tensor, Tensor, Tensor]:
    """Columns [k], one an expert that was used, their coefficients [LENGTH, k], and a change [k, d] of them that
    moves the output as a nudge does."""
    seen = probe.clean[place.module][0]
    z = _coefficients(probe, place)
    largest = z.abs().amax(dim=0)
    starts = torch.tensor([0, *place.widths]).cumsum(0)[:-1].tolist()
    spans = zip(starts, place.widths, strict=True)
    best = [start + int(largest[start : start + width].argmax()) for start, width in spans]
    columns = torch.tensor([at for at in best if largest[at] > 0] or best[:1])
    root = seen.made.float().pow(2).mean().sqrt().clamp(min=1e-3)
    sizes = NUDGE * root / largest[columns].clamp(min=1e-6)
    phases = torch.arange(len(columns)).tolist()
    moves = torch.stack([size * pattern(seen.made, float(phase)) for size, phase in zip(sizes, phases, strict=True)])
    return columns, z[:, columns], moves


def _coefficients(probe: Probe, place: Place) -> Tensor:
    """[LENGTH, m] of the untouched probe, float32."""
    if place.dense:
        return place.stacks[0].joined(probe.clean[place.module][0].given.reshape(LENGTH, -1), 1).float()
    return probe.routed[place.module].coefficients().float()


def _as_told(before: Tensor, written: Tensor, told: Tensor, stream: Tensor | None = None) -> bool:
    """Whether two tensors agree up to a share of what changed and the last places of their type.

    ``stream`` is what a block was given, of which its output is a sum.
    """
    half = told.dtype in (torch.bfloat16, torch.float16)
    one, other = written.float(), told.float()
    change = float((other - before.float()).abs().max())
    # Where a half-precision stream is large, its last place is larger than what was added to it,
    # also where an FFN takes away most of it: the sum is small then, its terms are not.
    size = torch.maximum(one.abs(), other.abs())
    if stream is not None and stream.shape == size.shape:
        size = torch.maximum(size, stream.float().abs().to(size.device))
    last = 4 * torch.finfo(told.dtype).eps * size
    return bool(((one - other).abs() <= (ROUNDED if half else EXACT) * change + last).all())


def _added(move: Tensor, made: Tensor) -> Tensor:
    return (made.float() + move.reshape(made.shape)).to(made.dtype)
