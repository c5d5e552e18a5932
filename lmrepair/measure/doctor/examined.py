"""A model looked at before its first repair; no weight is changed."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from lmrepair.failures import Tokens
from lmrepair.measure.doctor.engines import Served, served
from lmrepair.measure.doctor.estimate import Need, Speed, needs, speed
from lmrepair.measure.doctor.memory import free_for
from lmrepair.measure.doctor.tokenizer import Trap, traps, turn_end
from lmrepair.model import Head, Net, own_texts, weight


@dataclass(frozen=True)
class Places:
    """What was placed: each layer's FFN output projection under ``ffn`` (a pattern of names), and head and norm.

    ``neurons``: of every layer; ``norm`` and ``head`` are names, the norm's empty where the head reads something else.
    """

    layers: int
    ffn: tuple[str, ...]
    neurons: tuple[int, ...]
    hidden: int
    head: str
    norm: str
    seconds: float


@dataclass(frozen=True)
class Logits:
    """The head: ``vocabulary`` rows, ``tied`` to the embeddings or not, and what follows it: a ``scale``, a ``cap``.

    ``plain``: whether a scale or a cap is all that follows.
    """

    vocabulary: int
    tied: bool
    scale: float
    cap: float
    plain: bool


@dataclass(frozen=True)
class Examination:
    """What was found of a model.

    ``dtypes``: bytes of the weights by dtype. ``context``: positions, None where nothing limits them. ``turn_end``: the
    token that the chat template ends a turn with, empty for none; None without a template. ``free``: bytes that could
    be had.
    """

    model: str
    kind: str
    source: str
    device: str
    parameters: int
    dtypes: dict[str, int]
    places: Places
    logits: Logits
    context: int | None
    tokens: int
    turn_end: str | None
    traps: tuple[Trap, ...]
    free: int
    speed: Speed
    needs: tuple[Need, ...]
    served: tuple[Served, ...]


def examine(net: Net) -> Examination:
    """Look at a model: a handful of short passes, in seconds. Its places were proved when it was loaded."""
    weights: dict[str, int] = {}
    for parameter in net.model.parameters():
        name = str(parameter.dtype).removeprefix("torch.")
        weights[name] = weights.get(name, 0) + parameter.numel() * parameter.element_size()
    free, measured = free_for(net), speed(net, own_texts(net))
    if free is None:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return Examination(
        model=net.name,
        kind=type(net.model).__name__,
        source=" ".join(part for part in (net.source.kind, net.source.form) if part),
        device=str(net.device),
        parameters=sum(parameter.numel() for parameter in net.model.parameters()),
        dtypes=weights,
        places=_places(net),
        logits=_logits(net),
        context=net.anatomy.context,
        tokens=len(net.tokenizer),
        turn_end=turn_end(net)[0],
        traps=traps(net),
        free=free,
        speed=measured,
        needs=needs(net, measured, free),
        served=served(net),
    )


def _places(net: Net) -> Places:
    named = {module: name for name, module in net.model.named_modules()}
    patterns = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "N", name) for name in net.anatomy.names)
    norm = net.anatomy.norm
    return Places(
        layers=net.layers,
        ffn=tuple(patterns),
        neurons=net.widths,
        hidden=net.hidden,
        head=named.get(net.anatomy.head, ""),
        norm="" if norm is None else named.get(norm, ""),
        seconds=net.placing_seconds,
    )


def _logits(net: Net) -> Logits:
    text = Tokens("probe", (net.pad,), tuple(range(min(8, net.anatomy.vocabulary))))
    head = Head.of(net, text)
    tied = weight(net.anatomy.head).data_ptr() == net.model.get_input_embeddings().weight.data_ptr()
    return Logits(net.anatomy.vocabulary, tied, head.scale, head.cap, not head.whole)
