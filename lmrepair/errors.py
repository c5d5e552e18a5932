"""Every error a user can meet. A message says what was found, what was expected, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LmrepairError(Exception):
    """Base of all errors that lmrepair raises on purpose; the command line prints it as one line."""


class UsageError(LmrepairError):
    """An option, a method or a setting that does not exist or does not fit."""


class FailuresError(LmrepairError):
    """A file of failures (or reference text) that cannot be used as it is."""


class ModelError(LmrepairError):
    """A model that cannot be loaded, placed or edited."""


class NotFiniteError(ModelError):
    """A model whose logits are NaN or infinite: nothing can be read from it."""


class PatchError(LmrepairError):
    """A patch file that is damaged, or not a patch."""


class WrongModelError(PatchError):
    """A sound patch, but not for the model (or the state of the model) it was offered to."""


class ResultsError(LmrepairError):
    """A folder of the bench's results that cannot be shown as it is."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A clause that names the known word nearest to ``word``, or lists all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
