"""What a repair takes on this device: memory and time, from the model's sizes and one measured pass.

The formulas are in docs/doctor.md. What is estimated are orders of magnitude, to choose settings by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from lmrepair.failures import Tokens, read_kinds
from lmrepair.measure.doctor.products import timed
from lmrepair.methods import Method, MinKl, Star
from lmrepair.model import READ_AT_ONCE, Net, Planned, Sites, digest, planned, settled, windows

PROMPT, TARGET = 32, 8  # tokens of the failure that is reckoned with
# Settings, and the median time of a repair in forward passes over the same tokens, between what SmolLM2 and Gemma take
# (docs/LOG.md, 2026-11-30).
SETTINGS: tuple[tuple[str, Method, float], ...] = (
    ("--method minkl", MinKl(), 10.8),
    ("--method minkl --neurons 16", MinKl(neurons=16), 11.8),
    ("--method minkl --layers last", MinKl(layers="last"), 3.1),
    ("--method star", Star(), 25.0),
)
ALIKE = 320  # tokens of other requests in the failures' form
WRITTEN = 5  # tokens of the texts that are written to see how long one takes
HASHED, PRINTS = 1 << 24, 3  # bytes that are hashed to see how long it takes; fingerprints that a repair makes
STRIPS = 9 / 16  # of a symmetric sum is made and kept
GATE = 17  # tokens of each reference text that the gate reads, where it need not read on


@dataclass(frozen=True)
class Speed:
    """Measured seconds: for a ``token`` of a short failure, for a token of reference ``text`` (``READ_AT_ONCE`` in a
    pass, the head on all of them), for a ``step``, one more token of all the texts that a model writes side by side,
    for one more of an ``answer`` that it writes alone, and for a ``byte`` of weights that is hashed."""

    token: float
    text: float
    step: float
    answer: float
    byte: float


@dataclass(frozen=True)
class Need:
    """What some settings take beside the weights: ``statistics_seconds`` once for a model, ``seconds`` each repair.

    ``bytes`` is the most at one time; ``fits``: whether that is there.
    """

    settings: str
    statistics_seconds: float
    seconds: float
    bytes: int
    fits: bool


def speed(net: Net, texts: int) -> Speed:
    """Measure it, in a handful of passes; ``texts`` are written side by side."""
    token = net.pad
    long = min(READ_AT_ONCE, net.anatomy.context or READ_AT_ONCE)
    one, text = (
        net.batches([Tokens(str(at), (token,) * prompt, (token,) * target) for at in range(count)])[0]
        for count, prompt, target in ((1, PROMPT, TARGET), (READ_AT_ONCE // long, 1, long - 1))
    )
    with settled(net.model), torch.inference_mode():
        net.logits(one)
        return Speed(
            timed(net, lambda: net.logits(one)) / one.ids.numel(),
            timed(net, lambda: net.logits(text)) / text.ids.numel(),
            _written(net, texts),
            _written(net, 1),
            timed(net, lambda: digest(torch.zeros(HASHED, dtype=torch.uint8))) / HASHED,
        )


def _written(net: Net, texts: int) -> float:
    """A token of texts written side by side: what the later ones of a few take."""
    first, whole = (timed(net, partial(net.sample, texts, length)) for length in (1, WRITTEN))
    return max(0.0, whole - first) / (WRITTEN - 1)


def needs(net: Net, measured: Speed, free: int) -> tuple[Need, ...]:
    """What each of the SETTINGS takes."""
    found = []
    for text, method, passes in SETTINGS:
        method = method.suited(net, failures=1)
        asked = method.asks()
        plan = planned(net, asked, given=ALIKE * asked.kindred) if asked is not None else None
        sites = method.fixed_sites(net) or _share(net)
        samples = asked.samples if asked is not None else 0
        once = _gathering(net, plan, asked.slopes, measured) if plan and asked else 0.0
        each = passes * (PROMPT + TARGET) * measured.token + _gate(net, measured) + _checking(net, measured)
        each += _factoring(net, plan, sites, samples, measured) if plan is not None else 0.0
        room = max(_activations(net, READ_AT_ONCE) + _sums(net, plan), _solving(net, method, plan, sites, samples))
        found.append(Need(text, once, each, room, room <= free))
    return tuple(found)


def _share(net: Net) -> Sites:
    """Of methods that choose neurons by what the failures say: as many as STAR does, a quarter."""
    return Sites({layer: torch.arange(-(-width // 4)) for layer, width in enumerate(net.widths)})


def _gathering(net: Net, plan: Planned, slopes: bool, measured: Speed) -> float:
    """Texts written token by token, read forwards and, with gradients, back (three passes), and the products x xᵀ."""
    products = 2 * _numbers(_moments(net, plan), 0, STRIPS)
    return plan.length * measured.step + plan.tokens * (
        (3 if slopes else 1) * measured.text + products / _rate(net, measured)
    )


def _factoring(net: Net, plan: Planned, sites: Sites, samples: int, measured: Speed) -> float:
    """Cholesky factors of the moments of the layers written to; of n samples, the n × n products and their factor."""
    operations = 0.0
    for kind, widths in _moments(net, plan, sites):
        factored = {"full": [sum(widths)], "blocks": widths}.get(kind, ())
        operations += sum(width**3 / 3 for width in factored)
        operations += samples**2 * sum(widths) * 2 if kind == "sampled" else 0
    return operations / _rate(net, measured)


def _gate(net: Net, measured: Speed) -> float:
    """The beginning of each reference text that ships, read before and after."""
    tokens = sum(min(GATE, len(item.ids)) for kind in read_kinds() for item in windows(net, kind.texts))
    return 2 * tokens * measured.text


def _checking(net: Net, measured: Speed) -> float:
    """The answer in greedy text, and the weights hashed: for the statistics, the patch, and what it is applied to."""
    return TARGET * measured.answer + PRINTS * net.bytes * measured.byte


def _rate(net: Net, measured: Speed) -> float:
    """Operations in a second, as a pass makes them: two for each weight that a token meets."""
    table = net.model.get_input_embeddings().weight
    weights = sum(parameter.numel() for parameter in net.model.parameters())
    met = weights - (table.numel() if table is not net.anatomy.head.weight else 0)
    return float(2 * met / measured.text)


def _moments(net: Net, plan: Planned, sites: Sites | None = None) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Kind and widths (of each expert) of the moments of some layers (default: all)."""
    for layer in plan.kinds if sites is None else sites.layers:
        yield plan.kinds[layer][0], net.anatomy.ffns[layer].widths
        yield plan.kinds[layer][1], (net.hidden,)


def _numbers(moments: Iterator[tuple[str, tuple[int, ...]]], samples: int, share: float = 1.0) -> float:
    """Numbers in moments: a ``share`` of full ones, blocks as high as the widest expert, n sampled rows, diagonals."""
    found = 0.0
    for kind, widths in moments:
        width = sum(widths)
        rows = {"full": share * width, "blocks": max(widths), "sampled": samples}
        found += width * rows.get(kind, 1)
    return found


def _sums(net: Net, plan: Planned | None) -> int:
    """While texts are read: a little more than half of each symmetric sum."""
    return int(4 * _numbers(_moments(net, plan), plan.tokens, STRIPS)) if plan is not None else 0


def _solving(net: Net, method: Method, plan: Planned | None, sites: Sites, samples: int) -> int:
    """The packed statistics, factors of the layers written to, originals and deltas, and what the method keeps."""
    failure = Tokens("", (0,) * PROMPT, (0,) * TARGET)
    written = sum(len(columns) for columns in sites.columns.values()) * net.hidden
    held = plan.bytes + int(4 * _numbers(_moments(net, plan, sites), samples)) if plan else 0
    trial = written * (net.dtype.itemsize + 4)
    return held + trial + method.memory(net, [failure], sites) + _activations(net, PROMPT + TARGET)


def _activations(net: Net, tokens: int) -> int:
    """What a backward pass over some tokens needs: about twelve states and three FFN inputs a layer, and logits."""
    each = 12 * net.hidden * net.layers + 3 * sum(net.widths)
    return tokens * (each * net.dtype.itemsize + 3 * 4 * net.anatomy.vocabulary)
