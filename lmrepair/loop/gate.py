"""The gate as a value: what a patch must not do if it is to be kept. ``judge.py`` holds patches against it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmrepair.errors import UsageError
from lmrepair.failures import MAX_KL, Protected

if TYPE_CHECKING:
    from lmrepair.failures import Reference
    from lmrepair.patch import Patch

SOLVES = 8


@dataclass(frozen=True)
class Gate:
    """What a patch must not do if it is to be kept.

    ``max_kl``: KL(before ‖ after) on reference text, nats per token; the worst of ``references`` counts
    (none: the repair's own reference text, by kind where it is the one that ships); infinity: not measured.
    ``protect``: prompts that must come out as before. ``memory``: earlier patches; those of their repairs
    that hold now must hold afterwards. ``solves``: at most so many solves for one patch, where it has to be
    made again without some of the failures.
    """

    max_kl: float = MAX_KL
    references: tuple[Reference, ...] = ()
    protect: tuple[Protected, ...] = ()
    memory: tuple[Patch, ...] = ()
    solves: int = SOLVES

    def __post_init__(self) -> None:
        if not self.max_kl > 0:
            raise UsageError(f"max_kl is {self.max_kl}; expected nats per token above 0, or inf for no limit")
        if self.solves < 1:
            raise UsageError(f"solves is {self.solves}; expected at least 1")
