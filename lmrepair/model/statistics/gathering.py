"""Statistics gathered once for a model: kept on disk by its fingerprint, taken up again where a run was cut off."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lmrepair.errors import UsageError
from lmrepair.failures import Failure, Reference, Tokens
from lmrepair.model.anatomy import agreed
from lmrepair.model.digests import Fingerprint, fingerprint
from lmrepair.model.net import Net, settled
from lmrepair.model.process import Progress, give_back, quiet
from lmrepair.model.statistics.cache import CachedFile, OnDisk, Packed, cache_folder
from lmrepair.model.statistics.joining import joined
from lmrepair.model.statistics.moments import Asked, Moment, OnDemand, Statistics
from lmrepair.model.statistics.packing import pack, shapes, size, unpack
from lmrepair.model.statistics.sums import Sums, kind_for
from lmrepair.model.statistics.texts import answered, beginnings, windows

log = logging.getLogger("lmrepair")

TEXTS, LENGTH = 48, 48  # how much text a model writes for its own statistics, in tokens
MIXED = 4  # times as many texts for a mixture, each of whose experts sees a part of the tokens
FORMAT = 4
PART_SECONDS = 20.0  # of work that are at most lost where a run is cut off

Kinds = Mapping[int, tuple[str, str]]  # layer → how C and F are kept


@dataclass(frozen=True)
class Planned:
    """What statistics take: ``own`` texts of ``length`` tokens, all ``tokens`` that are read, the ``bytes`` that are
    kept, and how the moments of every layer are kept."""

    kinds: Kinds
    own: int
    length: int
    tokens: int
    bytes: int


def planned(net: Net, asked: Asked, own: int | None = None, given: int = 0) -> Planned:
    """What it takes to gather the statistics asked for, from the model's ``own`` texts and ``given`` other tokens."""
    length = min(LENGTH, (net.anatomy.context or LENGTH) - 1)
    count = own_texts(net) if own is None else own
    kinds = {
        layer: (kind_for(asked.inputs, place.widths), kind_for(asked.outputs, (net.hidden,)))
        for layer, place in enumerate(net.anatomy.ffns)
    }
    room = sum(
        size(one, place.widths, asked.samples) + size(other, (net.hidden,), asked.samples)
        for (one, other), place in zip(kinds.values(), net.anatomy.ffns, strict=True)
    )
    return Planned(kinds, count, length, count * length + given, room * ((count > 0) + (given > 0)))


def own_texts(net: Net) -> int:
    """How many texts the model writes where nobody says."""
    return TEXTS if all(place.dense for place in net.anatomy.ffns) else MIXED * TEXTS


def statistics_of(
    net: Net,
    asked: Asked,
    reference: Reference | Sequence[Failure] | None = None,
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress = quiet,
    own: int | None = None,
) -> Statistics:
    """The statistics a method asks for, from text the model writes by itself and, if given, a reference too: texts,
    or rows with their answers, of which the first 4,608 tokens are read (1,024 where none has an answer).

    ``own``: how many texts the model writes (default ``own_texts``); 0 where the reference alone is to be read.
    Kept in ``cache`` (default: ``cache_folder()``) under the model's fingerprint and what was asked; a
    file that is damaged or for something else is made anew, and a folder that cannot be written to is done
    without. What it takes is said through ``progress`` before it starts; a run that is cut off is taken up
    where it stood some seconds before.
    """
    given, other = _given(net, reference)
    plan = planned(net, asked, own, sum(len(item.target) for item in given))
    if plan.own < (not given):
        raise UsageError(f"{plan.own} texts of the model's own; expected 1 or more, or 0 beside other reference text")
    source = _Gathering(net, asked, plan.kinds, seed, cache or cache_folder(), fingerprint(net, {}))
    texts = [_Text(f"{plan.own} x {plan.length} own tokens, seed {seed}", plan.own, plan.length)] if plan.own else []
    texts += [_Text(other, 0, plan.length, given)] if given else []
    parts = [source.once(text, progress) for text in texts]
    return parts[0] if len(parts) == 1 else joined(parts[0], parts[1], asked.weighted)


@dataclass(frozen=True)
class _Text:
    """What is read for statistics: ``own`` texts of ``length`` tokens that the model writes, or what is ``given``."""

    name: str
    own: int
    length: int
    given: Sequence[Tokens] = ()

    @property
    def tokens(self) -> int:
        return self.own * self.length + sum(len(item.target) for item in self.given)


@dataclass(frozen=True)
class _Gathering:
    """Where statistics come from: a model and what is asked of it, and the folder in which they may be already."""

    net: Net
    asked: Asked
    kinds: Kinds
    seed: int
    folder: Path
    model: Fingerprint

    def once(self, text: _Text, progress: Progress) -> Statistics:
        """The statistics of a text, gathered where they are not in the folder."""
        file = self._file(text)
        found = _kept(file, self.net, self.kinds)
        if self.net.in_shards and not agreed(None if found is None else found[1].get("digest")):
            found = None  # every rank gathers, or none does
        if found is None:
            room = planned(self.net, self.asked).bytes / 1e6
            what = "this model" if text.own else text.name
            progress(f"statistics, once for {what}: {text.tokens:,} tokens, {room:.0f} MB kept", 0, 1)
            own = (text.own, text.length, self.seed)
            found = _packed(_gathered(file, self.net, text.given, self.asked, own, progress))
            give_back()
            error = file.write(*found)
            if error is not None:
                log.warning(
                    "statistics cannot be kept in %s (%s) and are gathered again next time; "
                    "LMREPAIR_CACHE names a folder",
                    self.folder,
                    getattr(error, "strerror", None) or error,
                )
            file.part.remove()
            found = _kept(file, self.net, self.kinds) or found  # on the disk, not in memory
            give_back()
        return _statistics(found, self.kinds, text.name)

    def _file(self, text: _Text) -> CachedFile:
        asked, begun = self.asked, beginnings(self.net, text.length) if text.own else []
        given = [[self.seed], *(item.ids for item in text.given)] if text.given else []
        read = hashlib.sha256(json.dumps(given).encode()).hexdigest()
        wanted = {"format": FORMAT, "body": self.model.body, "layers": self.model.layers, "text": text.name,
                  "given": read, "kinds": sorted(self.kinds.items()), "samples": asked.samples,
                  "torch": torch.__version__, "weighted": asked.weighted, "begun": begun,
                  "config": self.net.model.config.to_json_string(), "device": self.net.device.type}  # fmt: skip
        return CachedFile.of(self.folder, "statistics", wanted)


def _given(net: Net, reference: Reference | Sequence[Failure] | None) -> tuple[list[Tokens], str]:
    """The tokens of reference text that is given, and what it is called."""
    if not reference:
        return [], ""
    if isinstance(reference, Reference):
        return windows(net, reference.texts), reference.name
    given = answered(net, reference)
    what = "rows" if any(row.target for row in reference) else "requests in the failures' form"
    return given, f"{len(given)} of {len(reference)} {what}"


def _gathered(
    file: CachedFile, net: Net, given: Sequence[Tokens], asked: Asked, own: tuple[int, int, int], progress: Progress
) -> Statistics:
    """Written and read, from where a run before was cut off."""
    count, length, seed = own
    # Where several ranks go on from has to be the same, and each looks at a clock of its own.
    resumes = not net.in_shards
    part, began = (file.part.read() if resumes else None) or ({}, {}), time.monotonic()
    state = part[0]
    tokens: list[Tokens] = []
    if count:
        progress("own text", 0, 1)
        tokens = _texts(state.get("texts"), count, length) or _written(net, count, length, seed)
    texts = {"texts": torch.tensor([item.ids for item in tokens])}
    sums = Sums.of(net, [*tokens, *given], asked, seed)
    if "done" in state and tokens == _texts(state.get("texts"), count, length):
        sums.resume(state)
    elif resumes and time.monotonic() - began > PART_SECONDS:
        file.part.write(texts, {})
    saved = time.monotonic()
    for done, total in sums.read():
        progress("statistics", done, total)
        if resumes and time.monotonic() - saved > PART_SECONDS and done < total:
            file.part.write({**texts, **sums.state()}, {})
            saved = time.monotonic()
    return sums.statistics("")


def _written(net: Net, count: int, length: int, seed: int) -> list[Tokens]:
    with settled(net.model):
        made = net.sample(count, length, seed, beginnings(net, length))
    give_back()
    return made


def _texts(ids: Tensor | None, count: int, length: int) -> list[Tokens]:
    """The model's own texts as a file keeps them; none where it keeps others."""
    if ids is None or tuple(ids.shape) != (count, length + 1):
        return []
    return [Tokens(str(at), (row[0],), tuple(row[1:])) for at, row in enumerate(ids.tolist())]


def _packed(statistics: Statistics) -> Packed:
    tensors: dict[str, Tensor] = {}
    for part, moments in (("inputs", statistics.inputs), ("outputs", statistics.outputs)):
        for layer in moments:
            tensors |= {f"{part}.{layer}.{name}": piece for name, piece in pack(moments[layer]).items()}
    return tensors, {"tokens": statistics.tokens}


def _statistics(found: Packed, kinds: Kinds, name: str) -> Statistics:
    """Moments in float32, each unpacked when it is asked for."""
    tensors, record = found

    def moment(part: str, layer: int) -> Moment:
        start = f"{part}.{layer}."
        there = tensors.anew() if isinstance(tensors, OnDisk) else tensors
        return unpack({name[len(start) :]: there[name] for name in tensors if name.startswith(start)})

    inputs = OnDemand(kinds, lambda layer: moment("inputs", layer), keep=False)
    outputs = OnDemand(kinds, lambda layer: moment("outputs", layer), keep=False)
    return Statistics(inputs, outputs, name, record["tokens"])


def _kept(file: CachedFile, net: Net, kinds: Kinds) -> Packed | None:
    """What a file keeps, or None where it is missing, damaged, or for something else."""
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for layer, both in kinds.items():
        for part, kind, width in zip(
            ("inputs", "outputs"), both, (net.anatomy.ffns[layer].widths, (net.hidden,)), strict=True
        ):
            wanted |= {f"{part}.{layer}.{name}": form for name, form in shapes(kind, width).items()}

    def fit(tensors: Mapping[str, Tensor]) -> bool:
        return set(tensors) == set(wanted) and all(_fits(tensors[name], *form) for name, form in wanted.items())

    found = file.read(fit)
    tokens = found[1].get("tokens") if found else None
    return found if type(tokens) is int and tokens > 0 else None


def _fits(values: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    open_ended = shape[0] < 0 and values.dim() == 2
    alike = tuple(values.shape) == ((len(values), *shape[1:]) if open_ended else shape)
    return values.dtype == dtype and alike and bool(values.isfinite().all())
