"""Results as plain data, and text that is safe to show.

Everything that came from a prompt, a file or a model is shown through ``visible``: control characters,
which could drive a terminal, are spelled out, and nothing is read as markup.
"""

from __future__ import annotations

WIDTH = 60


def visible(text: str, width: int | None = WIDTH) -> str:
    """The text on one line with what does not print spelled out; cut in the middle to ``width``."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    if width is None or len(shown) <= width:
        return shown
    head = width // 2
    return f"{shown[:head]} … {shown[-(width - head - 3) :]}"
