"""Failures tokenised and batched once: what the loop, the solver, the check and the gate hand on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from lmrepair.diagnosis import Diagnosis, diagnoses
from lmrepair.failures import Failure, Tokens
from lmrepair.model import Batch, Net, Preference, greedy, settled

FORWARDS_TIMED, TIMED_SECONDS = 3, 0.5
LOGITS_TIMED = 1 << 27  # numbers: a plain forward pass makes those of all positions, 512 MB in float32


@dataclass(frozen=True)
class Case:
    """Failures as a net reads them: their ``tokens``, and the ``batches`` that hold these in order."""

    net: Net
    failures: tuple[Failure, ...]
    tokens: tuple[Tokens, ...]
    batches: tuple[Batch, ...]

    @staticmethod
    def of(net: Net, failures: Sequence[Failure]) -> Case:
        """Raises FailuresError or ModelError for failures that do not fit the model."""
        tokens = net.tokenize(failures)
        return Case(net, tuple(failures), tuple(tokens), tuple(net.batches(tokens)))

    def only(self, chosen: Sequence[int]) -> Case:
        """The case of some of the failures, by their indices in order."""
        if len(chosen) == len(self.failures):
            return self
        tokens = tuple(self.tokens[index] for index in chosen)
        return Case(self.net, tuple(self.failures[i] for i in chosen), tokens, tuple(self.net.batches(tokens)))

    def diagnose(self, known: Preference | None = None) -> list[Diagnosis]:
        """Mistakes of every failure; without a forward pass where it is ``known`` what the net prefers now."""
        return diagnoses(self.batches, known if known is not None else self.net.prefer(self.batches))

    def check(self, known: Preference | None = None) -> tuple[list[Diagnosis], list[bool]]:
        """The diagnosis, and whether greedy decoding gives each target (False, untried, after a mistake)."""
        with settled(self.net.model):
            found = self.diagnose(known)
            made = iter(greedy(self.net, [item.tokens for item in found if not item.mistakes], until_wrong=True))
            return found, [not item.mistakes and next(made) == item.tokens.target for item in found]


def forward_seconds(net: Net, batches: Sequence[Batch]) -> float:
    """The time of one plain forward pass over the batches, median of three, or of as few as take half a second.

    Of many failures, as few rows at a time as keep the logits below LOGITS_TIMED.
    """
    times: list[float] = []
    vocabulary = net.anatomy.vocabulary
    with torch.inference_mode():
        while len(times) < FORWARDS_TIMED and sum(times) < TIMED_SECONDS:
            began = time.perf_counter()
            for batch in batches:
                rows = max(1, LOGITS_TIMED // (vocabulary * batch.ids.shape[1]))
                for ids, mask in zip(batch.ids.split(rows), batch.mask.split(rows), strict=True):
                    net.model(input_ids=ids, attention_mask=mask, use_cache=False)
            if net.device.type == "cuda":
                torch.cuda.synchronize(net.device)
            times.append(time.perf_counter() - began)
    return median(times)
