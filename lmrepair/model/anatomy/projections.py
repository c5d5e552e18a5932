"""Which matrix of each block is its FFN output projection, by what it reads, what reads it, and a proof.

It is the matrix that (1) writes the hidden width, (2) is added to the residual stream, position by position,
without another matrix in between, and (3) is fed position by position: on every way from the stream to its
input, a nudge at one position arrives there and nowhere else, where attention would spread it. Among
several, the one with the most coefficients.
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
    NUDGE,
    POSITION,
    Change,
    Probe,
    Runs,
    Seen,
    by_position,
    changed,
    matrices,
    nudge,
    pattern,
    weight,
)

EXACT, ROUNDED = 1e-3, 5e-2  # what a proof may be off, in shares of the largest change: float32, half precision


@dataclass(frozen=True)
class _Block:
    """One block: its matrices by name, and the groups of them that read the same values."""

    where: str
    module: nn.Module
    parts: Mapping[str, nn.Module]
    groups: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class _Reach:
    """What a group reaches at once when it is nudged: matrix → positions; the block's output → positions."""

    inputs: Mapping[str, list[int] | None]
    output: list[int] | None


def projections(probe: Probe, stack: str, modules: Sequence[nn.Module], hidden: int) -> dict[str, nn.Module]:
    """Dotted name → FFN output projection, one for each block. Raises ModelError where there is no single one."""
    blocks = [_block(probe, f"{stack}.{at}", module, hidden) for at, module in enumerate(modules)]
    reached: list[list[_Reach]] = [[] for _ in blocks]
    for turn in range(max(len(block.groups) for block in blocks)):
        changes = {part: change for block in blocks for part, change in _nudged(block, turn).items()}
        runs = probe.rerun(modules, changes, held=True)
        for block, mine in zip(blocks, reached, strict=True):
            mine.append(_reach(probe, block, runs))
    runs = probe.rerun(modules, {}, held=True, stream=nudge)
    found: dict[str, nn.Module] = {}
    for block, reach in zip(blocks, reached, strict=True):
        name = _widest(probe, block, _candidates(probe, block, reach, _reach(probe, block, runs), hidden), hidden)
        found[f"{block.where}.{name}"] = block.parts[name]
    if len({weight(part).data_ptr() for part in found.values()}) < len(found):
        raise ModelError("layers share one FFN output projection; expected one of its own in each layer")
    _prove(probe, modules, found)
    return found


def _block(probe: Probe, where: str, module: nn.Module, hidden: int) -> _Block:
    for name, parameter in module.named_parameters():
        if parameter.dim() == 3 and min(parameter.shape) > 1 and hidden in parameter.shape:
            raise ModelError(
                f"{name} is a stack of matrices (a mixture of experts); expected one dense FFN in each block"
            )
    parts = matrices(module)
    seen = [probe.clean[part][0].given for part in parts.values() if part in probe.clean]
    if len(seen) < len(parts) or any(by_position(given) is None for given in seen):
        raise ModelError("some matrices of a block do not see every token (a mixture of experts); expected a dense FFN")
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


def _candidates(probe: Probe, block: _Block, reach: Sequence[_Reach], stream: _Reach, hidden: int) -> list[str]:
    """Names of the matrices that write to the residual stream and are fed position by position.

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
        calls = probe.clean[block.parts[group[0]]]
        alone = len(group) == len(calls) == 1 and calls[0].made.shape[-1] == hidden
        if alone and reach[at].output == [POSITION] and pointwise(group[0], frozenset(group)):
            found.append(group[0])
    return found


def _widest(probe: Probe, block: _Block, names: Sequence[str], hidden: int) -> str:
    widths = {name: probe.clean[block.parts[name]][0].given.shape[-1] for name in names}
    widest = [name for name, width in widths.items() if width == max(widths.values())]
    if len(widest) != 1:
        raise ModelError(
            f"{block.where} has {len(widest)} candidates for its FFN output projection "
            f"({', '.join(widest) or 'none'}); expected exactly one matrix that writes width {hidden} "
            "to the residual stream and is fed position by position. Mixtures of experts and "
            "state-space blocks are not supported"
        )
    return widest[0]


def _prove(probe: Probe, modules: Sequence[nn.Module], found: Mapping[str, nn.Module]) -> None:
    """Raise ModelError unless a changed column shows as coefficient × change, at every position, and nowhere else.

    The blocks' outputs with one column of each projection changed must be those with coefficient × change
    added to what the untouched projection puts out, whatever follows it in the block; so must all that the
    block's other matrices are given.
    """
    columns = {part: _strongest(probe.clean[part][0]) for part in found.values()}
    kept = {part: _column(part, at).clone() for part, (at, _) in columns.items()}
    try:
        for part, (at, move) in columns.items():
            _column(part, at).add_(move.to(kept[part].dtype))
        moves = {part: _column(part, at).float() - kept[part].float() for part, (at, _) in columns.items()}
        written = probe.rerun(modules, {}, held=False)
    finally:
        for part, (at, _) in columns.items():
            _column(part, at).copy_(kept[part])
    added = {
        part: partial(_added, probe.clean[part][0].given[..., at], moves[part]) for part, (at, _) in columns.items()
    }
    told = probe.rerun(modules, added, held=False)
    for name, block in zip(found, modules, strict=True):
        seen = [(run[block][0].made for run in (probe.clean, written, told))]
        seen += [(run[part][0].given for run in (probe.clean, written, told)) for part in matrices(block).values()]
        shows = [_as_told(*tensors) for tensors in seen]
        if not all(shows) or torch.equal(written[block][0].made, probe.clean[block][0].made):
            raise ModelError(
                f"{name} cannot be proved to be the block's FFN output projection: a change of one of its columns "
                "does not show as coefficient × change in what the block puts out; expected a matrix that nothing "
                "else reads and whose weights are the ones that run"
            )


def _as_told(before: Tensor, written: Tensor, told: Tensor) -> bool:
    """Whether two tensors agree up to a share of what changed and the last places of their type."""
    half = told.dtype in (torch.bfloat16, torch.float16)
    one, other = written.float(), told.float()
    change = float((other - before.float()).abs().max())
    # Where a half-precision stream is large, its last place is larger than what was added to it.
    last = 4 * torch.finfo(told.dtype).eps * torch.maximum(one.abs(), other.abs())
    return bool(((one - other).abs() <= (ROUNDED if half else EXACT) * change + last).all())


def _strongest(seen: Seen) -> tuple[int, Tensor]:
    """The column with the largest coefficient, and a change [d] of it that moves the output as a nudge does."""
    coefficients = seen.given.reshape(-1, seen.given.shape[-1]).float().abs().amax(dim=0)
    at = int(coefficients.argmax())
    size = NUDGE * seen.made.float().pow(2).mean().sqrt().clamp(min=1e-3) / coefficients[at].clamp(min=1e-6)
    return at, size * pattern(seen.made)


def _column(part: nn.Module, at: int) -> Tensor:
    """Neuron ``at`` of a projection, [d]: a view."""
    return weight(part)[at] if isinstance(part, Conv1D) else weight(part)[:, at]


def _added(coefficients: Tensor, move: Tensor, made: Tensor) -> Tensor:
    return (made.float() + coefficients.float()[..., None] * move).to(made.dtype)
