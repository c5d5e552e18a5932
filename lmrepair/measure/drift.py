"""What patches change on text they were not made for: KL and agreement against the untouched model.

The untouched model's states in front of the head are what is kept of it, never its probabilities: the head is
run on both models' states, a block of positions at a time, in float32 with sums in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lmrepair.errors import UsageError
from lmrepair.failures import Reference, Tokens
from lmrepair.model import TOKENS_AT_ONCE, WINDOW, Batch, Head, Net, settled, windows

NUMBERS_IN_CACHE = 1 << 17  # of float32: 0.5 MB


@dataclass(frozen=True)
class Drift:
    """Change of predictions on reference text.

    ``kl``: mean KL(before ‖ after), nats per token. ``agreement``: share of tokens whose most likely
    successor is still a most likely one. ``tokens``: how many were read. Perplexity: exp of the mean
    cross-entropy of the text's own next tokens, without and with the patch.
    """

    kl: float
    agreement: float
    tokens: int
    perplexity_before: float = math.nan
    perplexity_after: float = math.nan

    @staticmethod
    def of(table: Tensor, shares: Tensor | None = None) -> Drift:
        """From [n, 4], position by position: KL, whether it agrees, cross-entropy before and after.

        ``shares`` [n]: what each position counts for (default: all the same).
        """
        means = table.mean(dim=0) if shares is None else shares @ table / shares.sum()
        kl, same, before, after = means.tolist()
        return Drift(kl, same, len(table), perplexity(before), perplexity(after))


class Edit(Protocol):
    """What can be measured: a patch, or anything that writes weights for the length of a ``with`` block."""

    def on(self, net: Net) -> AbstractContextManager[None]:
        """The net with the edit, put back afterwards."""


def measure_drift(
    net: Net,
    patches: Sequence[Edit],
    reference: Reference,
    progress: Callable[[int, int], None] | None = None,
) -> list[Drift]:
    """The drift of each patch on its own, against the net as it is now.

    The untouched model reads each batch once, whatever the number of patches.
    """
    tables: list[Tensor] = []
    with settled(net.model), torch.inference_mode():
        head, batches = text_batches(net, windows(net, reference.texts))
        for number, batch in enumerate(batches):
            tables.append(compare(head, batch, head.seen(batch), patches))
            if progress is not None:
                progress(number + 1, len(batches))
    return [Drift.of(table) for table in torch.cat(tables, dim=1)]


def measure_drift_by_kind(
    net: Net,
    patches: Sequence[Edit],
    references: Sequence[Reference],
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Drift]]:
    """For each patch its drift on each reference, by the reference's name, the largest KL first.

    Raises UsageError for two references of one name.
    """
    names = refuse_namesakes(references)
    measured = []
    for number, reference in enumerate(references):
        measured.append(measure_drift(net, patches, reference))
        if progress is not None:
            progress(number + 1, len(references))
    return [worst_first(dict(zip(names, drifts, strict=True))) for drifts in zip(*measured, strict=True)]


def refuse_namesakes(references: Sequence[Reference]) -> list[str]:
    """The references' names. Raises UsageError for two of one name."""
    names = [reference.name for reference in references]
    if len(set(names)) < len(names):
        raise UsageError(f"references {', '.join(names)}: two have one name; give each kind of text its own")
    return names


def worst_first(kinds: Mapping[str, Drift]) -> dict[str, Drift]:
    """Drift by kind of text, the largest KL first, and what is no number before all."""
    return dict(sorted(kinds.items(), key=lambda item: (not math.isnan(item[1].kl), -item[1].kl)))


def perplexity(entropy: float) -> float:
    """exp of a cross-entropy in nats; infinite where that is beyond a float."""
    return math.exp(entropy) if entropy < 700 else math.inf


def text_batches(net: Net, texts: Sequence[Tokens], head: Head | None = None) -> tuple[Head, list[Batch]]:
    """The texts in batches of a size that can be kept, and the way from states to logits (found out, if not given)."""
    head = head or Head.of(net, texts[0])
    at_once = max(WINDOW, head.positions) if head.whole else TOKENS_AT_ONCE
    return head, net.batches(texts, at_once)


def compare(head: Head, batch: Batch, seen: Tensor, edits: Sequence[Edit]) -> Tensor:
    """[edits, n, 4] (float64) for what the untouched model's head has ``seen`` at the n target positions of a batch.

    KL, 1 where the most likely token stays one, and the cross-entropy of the wanted token, before and after.
    """
    after = []
    for edit in edits:
        with edit.on(head.net):
            after.append(head.seen(batch))
    found = torch.empty(len(edits), len(seen), 4, dtype=torch.float64)
    for start in range(0, len(seen), head.positions):
        rows = slice(start, start + head.positions)
        base = _Base.of(head.logits(seen[rows]), batch.wanted[rows])
        for index, states in enumerate(after):
            found[index, rows] = base.compare(head.logits(states[rows])).cpu()
    return found


@dataclass(frozen=True)
class _Base:
    """What the untouched model says at n positions: logits [n, V], their log-sum [n, 1], and how it is compared with.

    Rows are taken a few at a time, as many as stay in a CPU's cache.
    """

    logits: Tensor
    norms: Tensor
    likely: Tensor
    wanted: Tensor

    @staticmethod
    def of(logits: Tensor, wanted: Tensor) -> _Base:
        exact = _exact(logits)
        return _Base(exact, exact.logsumexp(dim=1, keepdim=True), exact.argmax(dim=1, keepdim=True), wanted[:, None])

    def compare(self, logits: Tensor) -> Tensor:
        """[n, 4]: KL, agreement, the wanted token's cross-entropy before and after.

        Σ p (log p − log q) is summed as Σ q − p − p t with t = log q − log p, where q − p is p (eᵗ − 1) for
        small t: all terms are positive, so that a small divergence is not lost among large terms that cancel.
        """
        parts = []
        for rows in _few_rows(logits):
            before, norm, after = self.logits[rows], self.norms[rows], _exact(logits[rows])
            total = after.logsumexp(dim=1, keepdim=True)
            p, t = (before - norm).exp_(), (after - before).sub_(total - norm)
            terms, near = t.expm1().sub_(t).mul_(p), t.abs() < 1
            if not bool(near.all()):
                far = (after - total).exp_() - p - torch.where(p > 0, p * t, 0.0)
                terms = torch.where(near, terms, far)
            kl = terms.sum(dim=1, dtype=torch.float64)
            same = after.gather(1, self.likely[rows]).squeeze(1) == after.amax(dim=1)
            entropies = [(norm - before.gather(1, self.wanted[rows])), (total - after.gather(1, self.wanted[rows]))]
            parts.append(torch.stack([kl, same.double(), *(part.squeeze(1).double() for part in entropies)], dim=1))
        return torch.cat(parts)


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _few_rows(logits: Tensor) -> Iterator[slice]:
    count, width = logits.shape
    step = max(1, NUMBERS_IN_CACHE // width) if logits.device.type == "cpu" else count
    for start in range(0, count, step):
        yield slice(start, start + step)
