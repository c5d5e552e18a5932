"""What patches change on text they were not made for: KL and agreement against the untouched model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lmrepair.errors import UsageError
from lmrepair.failures import Reference
from lmrepair.model import WINDOW, Net, settled, windows

LOGITS_AT_ONCE = 1 << 24  # numbers: 64 MB in float32
NUMBERS_IN_CACHE = 1 << 17  # of float64: 1 MB


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
    sums = torch.zeros(len(patches), 3, dtype=torch.float64)
    count, entropy = 0, 0.0
    with settled(net.model), torch.inference_mode():
        batches = net.batches(windows(net, reference.texts), max(WINDOW, LOGITS_AT_ONCE // net.anatomy.vocabulary))
        for number, batch in enumerate(batches):
            base = _Base.of(net.logits(batch), batch.wanted)
            count += len(batch.wanted)
            entropy += base.entropy
            for index, patch in enumerate(patches):
                with patch.on(net):
                    after = net.logits(batch)
                sums[index] += base.compare(after)
            if progress is not None:
                progress(number + 1, len(batches))
    return [
        Drift(kl / count, same / count, count, perplexity(entropy / count), perplexity(crossed / count))
        for kl, same, crossed in sums.tolist()
    ]


def measure_drift_by_kind(
    net: Net,
    patches: Sequence[Edit],
    references: Sequence[Reference],
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Drift]]:
    """For each patch its drift on each reference, by the reference's name, the largest KL first.

    Raises UsageError for two references of one name.
    """
    names = [reference.name for reference in references]
    if len(set(names)) < len(names):
        raise UsageError(f"references {', '.join(names)}: two have one name; give each kind of text its own")
    measured = []
    for number, reference in enumerate(references):
        measured.append(measure_drift(net, patches, reference))
        if progress is not None:
            progress(number + 1, len(references))
    return [worst_first(dict(zip(names, drifts, strict=True))) for drifts in zip(*measured, strict=True)]


def worst_first(kinds: Mapping[str, Drift]) -> dict[str, Drift]:
    """Drift by kind of text, the largest KL first, and what is no number before all."""
    return dict(sorted(kinds.items(), key=lambda item: (not math.isnan(item[1].kl), -item[1].kl)))


def perplexity(entropy: float) -> float:
    """exp of a cross-entropy in nats; infinite where that is beyond a float."""
    return math.exp(entropy) if entropy < 700 else math.inf


@dataclass(frozen=True)
class _Base:
    """What the untouched model predicts at N positions, [N, V] in float64, and how it is compared with.

    Rows are taken a few at a time, as many as stay in a CPU's cache: the sums are the same, and several
    times faster than over all rows at once.
    """

    probabilities: Tensor
    certainty: Tensor
    likely: Tensor
    wanted: Tensor
    entropy: float

    @staticmethod
    def of(logits: Tensor, wanted: Tensor) -> _Base:
        chances = torch.empty(logits.shape, dtype=torch.float64, device=logits.device)
        parts = []
        for rows in _few_rows(logits):
            logs = logits[rows].double().log_softmax(dim=1)
            torch.exp(logs, out=chances[rows])
            entropy = -logs.gather(1, wanted[rows, None]).squeeze(1)
            parts.append((torch.linalg.vecdot(chances[rows], logs), logs.argmax(dim=1), entropy))
        certainty, likely, entropies = (torch.cat(column) for column in zip(*parts, strict=True))
        return _Base(chances, certainty, likely, wanted, float(entropies.sum()))

    def compare(self, logits: Tensor) -> Tensor:
        """Sums over the positions [3]: KL, positions that agree, cross-entropy of the wanted tokens."""
        total = torch.zeros(3, dtype=torch.float64, device=logits.device)
        for rows in _few_rows(logits):
            after = logits[rows].double()
            norm = after.logsumexp(dim=1)
            # Σ p (log p − log q), with log q = logit − logsumexp and Σ p = 1
            kl = self.certainty[rows] - torch.linalg.vecdot(self.probabilities[rows], after) + norm
            same = after.gather(1, self.likely[rows, None]).squeeze(1) == after.amax(dim=1)
            crossed = norm - after.gather(1, self.wanted[rows, None]).squeeze(1)
            total += torch.stack([kl.clamp(min=0).sum(), same.double().sum(), crossed.sum()])
        return total.cpu()


def _few_rows(logits: Tensor) -> Iterator[slice]:
    count, width = logits.shape
    step = max(1, NUMBERS_IN_CACHE // width) if logits.device.type == "cpu" else count
    for start in range(0, count, step):
        yield slice(start, start + step)
