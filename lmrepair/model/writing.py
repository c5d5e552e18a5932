"""Tokens written side by side: prompts of several lengths in one pass, rows that have ended left out of the next.

Where it is known what a text should be, it is read several tokens a pass first (as in speculative decoding, the
wanted text being the draft): only what is not sure to be written so is written token by token.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lmrepair.errors import ModelError, NotFiniteError
from lmrepair.failures import Tokens
from lmrepair.model.anatomy import not_finite
from lmrepair.model.batches import Preference
from lmrepair.model.head import LOGITS_AT_ONCE
from lmrepair.model.net import Net, settled

AT_ONCE = 32  # rows side by side
TOKENS_AT_ONCE = 4096  # tokens of prompts in one pass, padding counted
PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)  # caches of keys and values, which go on with any number of tokens
PLACES = 64  # units in the last place; 22 at most were seen between one token a pass and several (135 and 270 M)
PROOF = 6  # tokens of a prompt, and of padding before it, with which it is proved that padding changes nothing

Prompt = tuple[int, ...]
Choose = Callable[[Sequence[int], Tensor], Tensor]
Ended = Callable[[int, list[int]], bool]


def write(
    net: Net,
    prompts: Sequence[Prompt],
    length: int,
    choose: Choose,
    ended: Ended,
    report: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """What follows each prompt: at most ``length`` tokens, and no more than the model's context has room for.

    ``choose``: the next tokens [n] of some rows, from their logits [n, V]. ``ended``: whether a row's tokens are
    all that is wanted of it. Equal prompts are read once. Where padding on the left is proved to change nothing,
    prompts of several lengths run together, else only those of one length. Raises NotFiniteError where the model
    puts out what nothing can be chosen from, ModelError where it keeps no cache.
    """
    with settled(net.model), torch.inference_mode():
        mixed = _mix(net, prompts)
        return _all(net, prompts, length, choose, ended, mixed, report)


def greedy(
    net: Net, tokens: Sequence[Tokens], until_wrong: bool = False, drafts: Sequence[Sequence[int]] | None = None
) -> list[tuple[int, ...]]:
    """What ``Net.generate`` gives, prompts of several lengths side by side where that is proved to change nothing.

    ``until_wrong``: a text that is not its target ends with the first token that is another. A text ends with the
    first end token, nothing is filled up behind it. ``drafts``: what the texts probably are (with ``until_wrong``
    their targets): what is sure to be its draft is not written token by token.
    """
    likely = [item.target for item in tokens] if until_wrong and drafts is None else drafts
    with settled(net.model), torch.inference_mode():
        mixed = not net.in_shards and _mix(net, [item.prompt for item in tokens])
        sure = _as_drafted(net, tokens, likely, mixed) if likely is not None and not net.in_shards else {}
        rest = [item for row, item in enumerate(tokens) if row not in sure]
        written = iter(_greedy(net, rest, until_wrong) if mixed else [_until(t, net.ends) for t in net.generate(rest)])
        return [sure[row] if row in sure else next(written) for row in range(len(tokens))]


def _as_drafted(
    net: Net, tokens: Sequence[Tokens], drafts: Sequence[Sequence[int]], mixed: bool
) -> dict[int, tuple[int, ...]]:
    """Row → its text, where that is sure to be its draft: as long as the target, or ended."""
    whole = {
        row: replace(item, target=tuple(text))
        for row, (item, text) in enumerate(zip(tokens, drafts, strict=True))
        if len(text) == len(item.target) or not net.ends.isdisjoint(text[-1:])
    }
    held = assured(net, list(whole.values()), mixed)
    return {row: item.target for at, (row, item) in enumerate(whole.items()) if at in held}


def assured(net: Net, tokens: Sequence[Tokens], mixed: bool) -> set[int]:
    """Rows whose greedy text is sure to be their target.

    Read with the model's cache, some tokens a pass, every token of it leads by more than what another order of the
    same sums could turn round, and nothing but its last token ends a text. ``mixed``: prompts of several lengths run
    together.
    """
    ends = net.ends
    rows = [row for row, item in enumerate(tokens) if item.target and ends.isdisjoint(item.target[:-1])]
    longest = max((len(tokens[row].target) for row in rows), default=0)
    prompts = [tokens[row].prompt for row in rows]
    sure: set[int] = set()
    for group in together(prompts, longest, net.anatomy.context, mixed):
        sure |= _assured(net, {rows[at]: tokens[rows[at]] for at in group})
    return sure


def _assured(net: Net, tokens: Mapping[int, Tokens]) -> set[int]:
    """Of one group."""
    ids, mask = _padded([item.prompt for item in tokens.values()], net.pad)
    lengths = torch.tensor([len(item.target) for item in tokens.values()])
    longest = int(lengths.max())
    wanted = torch.tensor([[*item.target, *[net.pad] * (longest - len(item.target))] for item in tokens.values()])
    logits, cache = _read(net, ids, mask, None)
    leads = [_leads(logits, wanted[:, :1])]
    if longest > 1 and any(type(layer) not in PLAIN for layer in getattr(cache, "layers", [None])):
        return set()
    step = max(1, LOGITS_AT_ONCE // net.anatomy.vocabulary // len(tokens))
    given, told = wanted[:, :-1], wanted[:, 1:]
    for start in range(0, longest - 1, step):
        part = slice(start, start + step)
        mask = torch.cat([mask, torch.ones_like(given[:, part])], dim=1)
        logits, cache = _read(net, given[:, part], mask, cache, step)
        leads.append(_leads(logits, told[:, part]))
    over = torch.arange(longest) >= lengths[:, None]
    held = (torch.cat(leads, dim=1) | over).all(dim=1).tolist()
    return {row for row, holds in zip(tokens, held, strict=True) if holds}


def _leads(logits: Tensor, wanted: Tensor) -> Tensor:
    """Whether the wanted tokens [n, t] lead beyond doubt, of logits [n, t, V]."""
    flat = logits.flatten(0, 1)
    gap = Preference.of(flat, wanted.flatten().to(flat.device)).gap
    return (gap < -_blur(flat)).reshape(wanted.shape).cpu()


def _blur(logits: Tensor) -> float:
    """What another order of the same sums may move logits by: PLACES units in the last place of the largest, but no
    more of it than ``padding_is_unseen`` allows."""
    eps = torch.finfo(logits.dtype).eps
    return min(PLACES * eps, math.sqrt(eps)) * float(logits.abs().max())


def _greedy(net: Net, tokens: Sequence[Tokens], until_wrong: bool) -> list[tuple[int, ...]]:
    """Token by token, prompts of several lengths side by side."""

    ends = net.ends

    def ended(row: int, made: list[int]) -> bool:
        target = tokens[row].target
        wrong = until_wrong and made[-1] != target[len(made) - 1]
        return wrong or len(made) == len(target) or made[-1] in ends

    longest = max((len(item.target) for item in tokens), default=0)
    prompts = [item.prompt for item in tokens]
    return [tuple(text) for text in _all(net, prompts, longest, lambda _, logits: logits.argmax(dim=1), ended, True)]


def _until(text: Sequence[int], ends: frozenset[int]) -> tuple[int, ...]:
    """The text up to its first end token, that included: what follows it is padding."""
    last = next((at for at, token in enumerate(text) if token in ends), len(text) - 1)
    return tuple(text[: last + 1])


def _all(
    net: Net,
    prompts: Sequence[Prompt],
    length: int,
    choose: Choose,
    ended: Ended,
    mixed: bool,
    report: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    made: dict[int, list[int]] = {row: [] for row in range(len(prompts))}
    context, done = net.anatomy.context, 0
    for rows in together(prompts, length, context, mixed):
        wide = max(len(prompts[row]) for row in rows)
        room = length if context is None else min(length, context - wide)
        _write(net, {row: prompts[row] for row in rows}, room, choose, ended, made)
        done += len(rows)
        if report is not None:
            report(done, len(prompts))
    return list(made.values())


def together(prompts: Sequence[Prompt], length: int, context: int | None, mixed: bool) -> Iterator[list[int]]:
    """Rows that run together, the shortest first. ``mixed``: of several lengths, where the context has room for it."""
    group: list[int] = []
    for row in sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), prompts[row], row)):
        wide = len(prompts[row])
        alike = mixed and (context is None or wide + length <= context)
        fits = len(group) < AT_ONCE and wide * (len(group) + 1) <= TOKENS_AT_ONCE
        if group and not (fits and (alike or wide == len(prompts[group[0]]))):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _mix(net: Net, prompts: Sequence[Prompt]) -> bool:
    """Whether the prompts are of several lengths and may run together."""
    return len(set(map(len, prompts))) > 1 and padding_is_unseen(net, min(prompts, key=len))


def padding_is_unseen(net: Net, prompt: Prompt) -> bool:
    """Whether the model puts out the same logits behind a padded prompt, its last token read with the cache."""
    if "position_ids" not in inspect.signature(net.model.forward).parameters:
        return False
    some = (prompt * PROOF)[:PROOF]
    alone, _ = _read(net, *_padded([some], net.pad), None)
    mask = torch.tensor([[0] * PROOF + [1] * len(some)])
    ids = torch.tensor([[net.pad] * PROOF + list(some)])
    _, cache = _read(net, ids[:, :-1], mask[:, :-1], None)
    late, _ = _read(net, ids[:, -1:], mask, cache)
    allowed = math.sqrt(torch.finfo(alone.dtype).eps) * float(alone.abs().max())
    return float((late - alone).abs().max()) <= allowed


def _write(
    net: Net, prompts: Mapping[int, Prompt], room: int, choose: Choose, ended: Ended, made: Mapping[int, list[int]]
) -> None:
    """One group, token by token with the model's cache.

    ``reorder_cache`` is what every kind of layer has that picks rows: those of linear attention have no other.
    """
    rows, different = list(prompts), list(dict.fromkeys(prompts.values()))
    ids, mask = _padded(different, net.pad)
    logits, cache = _read(net, ids, mask, None)
    kept = torch.tensor([different.index(prompts[row]) for row in rows])
    logits, mask = logits[kept.to(net.device)], mask[kept]
    if cache is None:
        raise ModelError(
            "the model hands on no cache of what it has read; expected one (past_key_values) to write with"
        )
    cache.reorder_cache(kept.to(net.device))
    for left in range(room - 1, -1, -1):
        tokens = choose(rows, logits[:, -1]).cpu()
        for row, token in zip(rows, tokens.tolist(), strict=True):
            made[row].append(token)
        kept = torch.tensor([at for at, row in enumerate(rows) if not ended(row, made[row])], dtype=torch.long)
        if not left or not len(kept):
            return
        rows = [rows[at] for at in kept.tolist()]
        mask = torch.cat([mask[kept], torch.ones(len(rows), 1, dtype=mask.dtype)], dim=1)
        if len(rows) < len(tokens):
            cache.reorder_cache(kept.to(net.device))
        logits, cache = _read(net, tokens[kept, None], mask, cache)


def _read(net: Net, ids: Tensor, mask: Tensor, cache: Any, shown: int = 1) -> tuple[Tensor, Any]:
    """Logits [n, shown, V] behind the last of the tokens [n, t], and the cache; ``mask`` [n, T] is of all so far."""
    named: dict[str, Any] = {}
    if "position_ids" in inspect.signature(net.model.forward).parameters:
        named["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :].to(net.device)

    def last(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (given[0][:, -shown:], *given[1:])

    handle = net.anatomy.head.register_forward_pre_hook(last)
    try:
        output = net.model(
            input_ids=ids.to(net.device),
            attention_mask=mask.to(net.device),
            past_key_values=cache,
            use_cache=True,
            **named,
        )
    finally:
        handle.remove()
    logits: Tensor = output.logits[:, -shown:]
    if not bool(logits.amax(dim=-1).isfinite().all()):
        raise NotFiniteError(not_finite("", net.dtype))
    return logits, getattr(output, "past_key_values", None)


def _padded(prompts: Sequence[Prompt], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask [n, T], padded on the left."""
    wide = max(map(len, prompts))
    ids = [[pad] * (wide - len(prompt)) + list(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor([[0] * (wide - len(prompt)) + [1] * len(prompt) for prompt in prompts])
