"""The untouched model on reference text: read a stage at a time, as far as it takes to decide, and kept.

What it says is kept for a run as the states in front of its head, and on disk for the next one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor

from lmrepair.errors import UsageError
from lmrepair.failures import Reference, Tokens
from lmrepair.measure import Drift, Edit, compare, refuse_namesakes, text_batches, worst_first
from lmrepair.model import WINDOW, Batch, CachedFile, Fingerprint, Head, Net, cache_folder, settled, windows

STAGES = (16, 48, 128, WINDOW)  # how many tokens of each text are read by then; after the last, all that is measured
FORMAT = 1  # of the files of states
ERRORS, LARGEST = 4.0, 4.0  # how far a mean may be off: standard errors, and positions as large as the largest seen


@dataclass(frozen=True)
class Measured:
    """The drift of an edit on texts, by the reference's name (the largest KL first) and on all of them together."""

    kinds: Mapping[str, Drift]
    drift: Drift


@dataclass(frozen=True)
class Untouched:
    """What the net says of texts without any edit: the states [n, d] that its head reads, kept as they are read.

    ``texts``: which of the references each text is of, and its tokens. ``kept``: by stage and kinds, batches with
    the kind of each position, and the states; the gate and the record share them. ``full``: one stage, all of the
    texts. ``model``: the net's fingerprint, under which the states are kept on disk too (None: they are not).
    """

    net: Net
    references: tuple[Reference, ...]
    texts: tuple[tuple[int, Tokens], ...]
    head: Head
    full: bool = False
    model: Fingerprint | None = None
    kept: dict[tuple[int, tuple[int, ...]], list[tuple[Batch, Tensor, Tensor]]] = field(
        default_factory=dict, compare=False
    )

    @staticmethod
    def of(
        net: Net, references: Sequence[Reference], full: bool = False, model: Fingerprint | None = None
    ) -> Untouched:
        """Nothing is read yet but a few tokens. Raises UsageError for two references of one name."""
        refuse_namesakes(references)
        found = [(kind, item) for kind, one in enumerate(references) for item in windows(net, one.texts)]
        with settled(net.model):
            head = Head.of(net, found[0][1])
        # Ranks that share a model would each look at a disk of their own.
        return Untouched(net, tuple(references), tuple(found), head, full, None if net.in_shards else model)

    def covers(self, reference: Reference) -> bool:
        """Whether these are the texts of a reference, in whatever order."""
        mine = sorted(text for one in self.references for text in one.texts)
        return mine == sorted(reference.texts)

    def measure(self, edit: Edit, limit: float = math.inf) -> Measured:
        """Read on until no kind's KL can be on the other side of ``limit``; without a limit the first stage is all.

        Only kinds that are open are read on. The net has to be as it was when these texts were read first.
        """
        parts: list[list[Tensor]] = [[] for _ in self.references]
        left, whole = tuple(range(len(self.references))), self._positions(WINDOW)
        for stage in range(1 if self.full else len(STAGES)):
            with settled(self.net.model), torch.inference_mode():
                for batch, seen, kinds in self._stage(stage, left):
                    (table,) = compare(self.head, batch, seen, [edit])
                    for kind in kinds.unique().tolist():
                        parts[kind].append(table[kinds == kind])
            tables = [torch.cat(part) if part else torch.empty(0, 4) for part in parts]
            left = () if limit == math.inf else undecided([table[:, 0] for table in tables], whole, limit)
            if not left:
                break
        names = [reference.name for reference in self.references]
        drifts = {name: Drift.of(table) for name, table in zip(names, tables, strict=True)}
        counts = self._positions(WINDOW if self.full else STAGES[stage])
        return Measured(worst_first(drifts), Drift.of(torch.cat(tables), _shares(tables, counts)))

    def _positions(self, last: int) -> list[int]:
        """How many positions each kind of text has within the first ``last`` tokens of its texts."""
        found = [0] * len(self.references)
        for kind, item in self.texts:
            found[kind] += max(0, min(len(item.ids), last) - 1)
        return found

    def _stage(self, stage: int, wanted: tuple[int, ...]) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        if (stage, wanted) in self.kept:
            yield from self.kept[stage, wanted]
            return
        first, last = (0, WINDOW) if self.full else ((0, *STAGES)[stage], STAGES[stage])
        texts = [(kind, item) for kind, item in self.texts if kind in wanted]
        chosen = [(kind, piece) for kind, item in texts if (piece := _piece(item, max(first, 1), last))]
        kinds = torch.tensor([kind for kind, _ in chosen])
        _, batches = text_batches(self.net, [piece for _, piece in chosen], self.head) if chosen else (None, [])
        read, at = [], 0
        for batch, states in zip(batches, self._states(batches), strict=True):
            item = (batch, states, kinds[at : at + len(batch.tokens)][batch.owner.cpu()])
            at += len(batch.tokens)
            yield item
            if not self.head.whole:
                read.append(item)
        if not self.head.whole:
            self.kept[stage, wanted] = read

    def _states(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """What the head has seen of each batch: from the disk, or read and put there."""
        counts = [len(batch.wanted) for batch in batches]
        if self.model is None or self.head.whole or not counts:
            yield from map(self.head.seen, batches)
            return
        file = _file(self.net, self.model, batches)
        found = file.read(lambda tensors: set(tensors) == {"states"} and _fit(tensors["states"], sum(counts)))
        if found is not None:
            yield from found[0]["states"].to(self.net.device).split(counts)
            return
        states = []
        for batch in batches:
            states.append(self.head.seen(batch))
            yield states[-1]
        file.write({"states": torch.cat(states)}, {})


def _file(net: Net, model: Fingerprint, batches: Sequence[Batch]) -> CachedFile:
    """Under all that the states depend on: weights and how they are run, the texts, and who computes."""
    texts = [[(item.prompt, item.target) for item in batch.tokens] for batch in batches]
    run = (str(net.dtype), net.device.type, torch.get_num_threads(), torch.__version__, transformers.__version__)
    wanted = [FORMAT, model.body, model.layers, net.model.config.to_json_string(), run, texts]
    return CachedFile.of(cache_folder(), "untouched", wanted)


def _fit(states: Tensor, count: int) -> bool:
    return states.dim() == 2 and len(states) == count and bool(states.isfinite().all())


def _shares(tables: Sequence[Tensor], counts: Sequence[int]) -> Tensor | None:
    """What each position counts for where kinds stand for ``counts`` positions; None where these are the ones read."""
    if all(len(table) == count for table, count in zip(tables, counts, strict=True)):
        return None
    each = [count / max(1, len(table)) for table, count in zip(tables, counts, strict=True)]
    sizes = torch.tensor([len(table) for table in tables])
    return torch.tensor(each, dtype=torch.float64).repeat_interleave(sizes)


def read_fully(drift: str) -> bool:
    """Whether all of the texts are to be read. Raises UsageError for what is neither "quick" nor "full"."""
    if drift not in ("quick", "full"):
        raise UsageError(f"drift is {drift!r}; expected 'quick' (as much text as decides) or 'full' (all of it)")
    return drift == "full"


def undecided(kls: Sequence[Tensor], whole: Sequence[int], limit: float) -> tuple[int, ...]:
    """Which kinds may be on either side of the limit; none where one is known to be beyond it (or is no number).

    ``kls``: of each kind, those read so far; ``whole``: how many positions it has.
    """
    largest = max((float(kl.max()) for kl in kls if len(kl)), default=0.0)
    found = [bounds(kl, largest, 1 - len(kl) / max(1, count)) for kl, count in zip(kls, whole, strict=True)]
    if any(not low <= limit for low, _ in found):
        return ()
    return tuple(kind for kind, (_, high) in enumerate(found) if not high <= limit)


def bounds(kl: Tensor, largest: float, unread: float = 1.0) -> tuple[float, float]:
    """Between what the mean KL over a kind of text is taken to lie, from its values [n] at some positions.

    mean ± (ERRORS·s·√u/√n + LARGEST·u·largest/n), u the share of its positions that is ``unread``: a normal bound,
    and room for four positions in n yet unseen that are as large as the ``largest`` of all kinds. NaN where the
    mean is; no bound where nothing was read.
    """
    if not len(kl):
        return 0.0, math.inf
    mean = float(kl.mean())
    spread = float(kl.std(correction=1)) if len(kl) > 1 else mean
    off = ERRORS * spread * math.sqrt(unread / len(kl)) + LARGEST * unread * largest / len(kl)
    return mean - off, mean + off


def _piece(item: Tokens, first: int, last: int) -> Tokens | None:
    """The tokens from ``first`` to ``last``, predicted from all that stand before them."""
    ids = item.ids[:last]
    return Tokens(item.id, ids[:first], ids[first:]) if len(ids) > first else None
