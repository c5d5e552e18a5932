"""Where memory runs out: what would fit, computed from the model, the failures and the method."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmrepair.cli.faults.verdicts import memory_ran_out
from lmrepair.errors import LmrepairError

if TYPE_CHECKING:
    from lmrepair.failures import Tokens
    from lmrepair.methods import Method
    from lmrepair.model import Net

SPARE = 2.5  # times what a method says that it keeps: what comes and goes beside it, and gaps (measured: 1.2 to 2.2)
AT_ONCE = 2048  # padded tokens in a pass
BYTES = {"float32": 4, "bfloat16": 2}
READING = 1.2  # times the weights: what is held while they are read


@contextmanager
def fitting(room: int | None, advise: Callable[[int], str]) -> Iterator[None]:
    """Note on whatever runs out of memory inside what ``advise`` says would fit into the ``room`` bytes before it."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError, LmrepairError) as error:
        if room is not None and memory_ran_out(error) is not None:
            error.add_note(advise(room))
        raise


def load_advice(model: str | None, room: int) -> str:
    """In which dtype a model folder's weights would fit."""
    numbers = _numbers(Path(model)) if model is not None and Path(model).is_dir() else 0
    if not numbers:
        return f"{_gb(room)} were free before it was loaded; free some, or take a smaller model"
    needs = {name: int(READING * numbers * size) for name, size in BYTES.items()}
    said = ", ".join(f"{_gb(need)} in {name}" for name, need in needs.items())
    fits = [f"--dtype {name}" for name, need in needs.items() if need <= room]
    return f"loading takes about {said}, and {_gb(room)} were free; {_what_fits(fits)}"


def solve_advice(net: Net, tokens: Sequence[Tokens], method: Method, alone: bool, room: int) -> str:
    """Which settings, and how many failures at a time, would fit a solve of these failures."""

    def need(items: Sequence[Tokens], how: Method = method) -> int:
        return max(_need(net, [item], how) for item in items) if alone else _need(net, items, how)

    fits = []
    low, high = 0, len(tokens)  # the first ``low`` fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if need(tokens[:middle]) <= room else (low, middle)
    if low:
        fits.append(f"--limit {low} ({_gb(need(tokens[:low]))})")
    one = max(_need(net, [item], method) for item in tokens)
    if not alone and len(tokens) > 1 and one <= room:
        fits.append(f"--alone ({_gb(one)})")
    if hasattr(method, "layers"):
        last: dict[str, Any] = {"layers": "last"}
        least = need(tokens, replace(method, **last))
        if least <= room and method.layers != "last":
            fits.append(f"--layers last ({_gb(least)})")
    saved = net.bytes // 2
    if net.dtype.itemsize == 4 and need(tokens) <= room + saved:
        fits.append(f"--dtype bfloat16 (the weights take {_gb(saved)} less)")
    said = f"{len(tokens)} failures with {method.name} take about {_gb(need(tokens))}, and {_gb(room)} were free"
    return f"{said}; {_what_fits(fits)}"


def _need(net: Net, tokens: Sequence[Tokens], method: Method) -> int:
    """About how many bytes a solve takes beside the model: what the method keeps, what is written to, one pass."""
    method = method.suited(net, len(tokens))
    sites = method.fixed_sites(net) or net.every_site()
    wide, deep = sum(net.widths), net.layers * net.hidden
    written = sum(len(columns) for columns in sites.columns.values()) * net.hidden * (net.dtype.itemsize + 12)
    read = min(AT_ONCE, len(tokens) * max(len(item.ids) for item in tokens))
    targets = min(read, sum(len(item.target) for item in tokens))
    one_pass = read * 4 * (4 * wide + 16 * deep) + targets * net.anatomy.vocabulary * 12
    return int(SPARE * method.needed(net, tokens, sites)) + written + one_pass


def _numbers(folder: Path) -> int:
    """How many numbers the folder's safetensors files hold, by their headers; 0 where these cannot be read."""
    found = 0
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, os.path.getsize(path))))
            found += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return found


def _what_fits(fits: Sequence[str]) -> str:
    return f"what fits: {', '.join(fits)}" if fits else "nothing less fits: free some memory, or take a smaller model"


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
