"""What most commands begin with: failures read, then a model loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmrepair.cli.output import say
from lmrepair.measure import visible

if TYPE_CHECKING:
    from lmrepair.failures import Failure
    from lmrepair.model import Net


def start(
    failures: Path,
    template: str | None,
    limit: int | None,
    chat: bool,
    end_turn: bool,
    model: str | None,
    device: str,
    dtype: str,
    seed: int,
    trust: bool,
) -> tuple[list[Failure], Net]:
    """Read the failures first: what is wrong with them is known before a model is loaded, or has worked."""
    from lmrepair.failures import read_failures

    rows = read_failures(failures, template, limit, chat, end_turn)
    net = load_net(model, device, dtype, seed, trust)
    net.tokenize(rows)
    return rows, net


def load_net(model: str | None, device: str, dtype: str, seed: int, trust: bool) -> Net:
    import torch

    from lmrepair.model import load

    torch.manual_seed(seed)
    net = load(model, device=device, dtype=dtype, trust_remote_code=trust)
    if net.source.unread:
        shown = ", ".join(visible(name, 80) for name in net.source.unread[:3])
        more = ", …" * (len(net.source.unread) > 3)
        say(f"not loaded: {len(net.source.unread)} tensors that the model has no place for ({shown}{more})", sys.stderr)
    return net


def dtype_of(dtype: str, patch: Any) -> str:
    """What a patch's model is loaded in: what the user says, or what the patch was made in."""
    return dtype if dtype != "auto" else str(patch.dtype).removeprefix("torch.")


def texts_of(rows: Sequence[Failure]) -> list[tuple[str, str]]:
    return [(row.asked, row.target) for row in rows]


def decoder_of(net: Net) -> Callable[[int], str]:
    return lambda token: str(net.tokenizer.decode([token]))
