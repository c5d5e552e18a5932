"""What most commands begin with: failures read, then a model loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lmrepair.cli.faults import fitting, load_advice
from lmrepair.cli.options import LoadOptions, RowOptions
from lmrepair.cli.output import say
from lmrepair.errors import UsageError
from lmrepair.measure import free, visible

if TYPE_CHECKING:
    from lmrepair.failures import Failure
    from lmrepair.model import Net

WORTH_SAYING = 2.0  # times as slow as float32


def start(failures: Path, rows_as: RowOptions, model: str | None, loading: LoadOptions) -> tuple[list[Failure], Net]:
    """Read the failures first: what is wrong with them is known before a model is loaded, or has worked."""
    rows = rows_as.read(failures)
    net = load_net(model, loading)
    net.tokenize(rows)
    return rows, net


def load_net(model: str | None, loading: LoadOptions) -> Net:
    import torch

    from lmrepair.measure import slowness
    from lmrepair.model import DTYPES, load

    torch.manual_seed(loading.seed)
    with fitting(free(), partial(load_advice, model)):
        net = load(model, device=loading.device, dtype=loading.dtype, trust_remote_code=loading.trust)
    if net.dtype not in DTYPES.values():
        raise UsageError(
            f"{visible(net.name)}: its weights are {str(net.dtype).removeprefix('torch.')}, which no patch file holds; "
            f"expected {', '.join(DTYPES)}: load it with --dtype float32"
        )
    if net.source.unread:
        shown = ", ".join(visible(name, 80) for name in net.source.unread[:3])
        more = ", …" * (len(net.source.unread) > 3)
        say(f"not loaded: {len(net.source.unread)} tensors that the model has no place for ({shown}{more})", sys.stderr)
    times = slowness(net)
    if times > WORTH_SAYING:
        say(
            f"slow: a gradient's products in {str(net.dtype).removeprefix('torch.')} take {times:.0f} times as long "
            "as in float32 here; --dtype float32 is quicker (its patch is for float32 weights)",
            sys.stderr,
        )
    return net


def texts_of(rows: Sequence[Failure]) -> list[tuple[str, str]]:
    return [(row.asked, row.target) for row in rows]


def decoder_of(net: Net) -> Callable[[int], str]:
    return lambda token: str(net.tokenizer.decode([token]))
