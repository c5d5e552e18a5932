"""The texts that are read for statistics and for drift."""

from __future__ import annotations

from collections.abc import Sequence

from lmrepair.errors import FailuresError
from lmrepair.failures import Tokens
from lmrepair.model.net import Net

WINDOW = 256  # tokens read of one reference text


def windows(net: Net, texts: Sequence[str]) -> list[Tokens]:
    """The first WINDOW tokens of each text, every token after the first to be predicted."""
    length = min(WINDOW, net.anatomy.context or WINDOW)
    found = []
    for index, text in enumerate(texts):
        ids = net.tokenizer(text, verbose=False)["input_ids"][:length]
        if len(ids) > 1:
            found.append(Tokens(str(index), tuple(ids[:1]), tuple(ids[1:])))
    if not found:
        raise FailuresError("the reference text is too short: expected texts of two tokens or more")
    return found
