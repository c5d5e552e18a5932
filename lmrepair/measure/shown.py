"""Results as plain data, and text that is safe to show.

Everything that came from a prompt, a file or a model is shown through ``visible``: control characters,
which could drive a terminal, are spelled out, and nothing is read as markup.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

WIDTH = 60


def plain(value: Any, digits: int | None = None) -> Any:
    """A result as JSON holds it: dataclasses and mappings are objects, what is no finite number is None.

    Floats are kept, or cut to significant ``digits``.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {spec.name: plain(getattr(value, spec.name), digits) for spec in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, digits) for item in value]
    if isinstance(value, float):
        return None if not math.isfinite(value) else value if digits is None else float(f"{value:.{digits}g}")
    return value


def visible(text: str, width: int | None = WIDTH) -> str:
    """The text on one line with what does not print spelled out; cut in the middle to ``width``."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    if width is None or len(shown) <= width:
        return shown
    head = width // 2
    return f"{shown[:head]} … {shown[-(width - head - 3) :]}"
