"""Where a model came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

HUB = "hub:"  # before a name: on the hub, whatever lies here


@dataclass(frozen=True)
class Source:
    """``kind``: folder, hub, gguf, embedded, or object for a model that the caller had loaded.

    A GGUF file has a ``digest``, the SHA-256 of its bytes, and the quantised ``form`` that its float weights
    were made from (Q4_K_M, …). ``unread`` names the tensors of the checkpoint that the model's class does
    not have: they are not in memory.
    """

    kind: str = "object"
    digest: str = ""
    form: str = ""
    unread: tuple[str, ...] = ()

    def data(self) -> dict[str, Any]:
        """What a patch keeps of it."""
        return {"kind": self.kind, "digest": self.digest, "form": self.form} if self.digest else {}
