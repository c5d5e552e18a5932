"""What a repair hands back: what became of every failure, the patch, what it cost."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lmrepair.diagnosis import Mistake
from lmrepair.failures import Failure, Reference, Tokens
from lmrepair.loop.search import Gated
from lmrepair.measure import Drift
from lmrepair.methods import Method
from lmrepair.patch import Patch


@dataclass(frozen=True)
class Outcome:
    """What became of one failure. ``reason`` says why it is not repaired, with advice; empty if it is.

    ``before`` and ``after`` are its mistakes under teacher forcing; ``after`` counts the repair's attempt
    even where that was undone, unless the gate undid it.
    """

    failure: Failure
    tokens: Tokens
    before: tuple[Mistake, ...]
    after: tuple[Mistake, ...]
    reason: str = ""

    @property
    def failing(self) -> bool:
        return bool(self.before)

    @property
    def repaired(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Cost:
    """Time from the first diagnosis to the last teacher-forced check, and that in forward equivalents.

    A forward equivalent is the time of one plain forward pass over the same prompts and targets, on the
    same model, in the same run (median of three). ``check_seconds`` is the greedy decoding afterwards,
    ``statistics_seconds`` what gathering (or reading) and inverting statistics took once, before the first repair,
    ``gate_seconds`` what the gate took beside solving again, ``drift_seconds`` the record's drift where the
    gate had not measured it, ``patch_seconds`` fingerprints, factors and what is left beside them, and applying.
    """

    seconds: float
    forward_equivalents: float
    check_seconds: float
    steps: int
    statistics_seconds: float = 0.0
    gate_seconds: float = 0.0
    drift_seconds: float = 0.0
    patch_seconds: float = 0.0


@dataclass(frozen=True)
class Repair:
    """The result: one outcome per failure, the patch (None if nothing was repaired), its drift and cost.

    ``gate``: what the gate did (None: there was none).
    """

    method: Method
    outcomes: tuple[Outcome, ...]
    patch: Patch | None
    drift: Drift | None
    cost: Cost
    gate: Gated | None = None

    @property
    def failing(self) -> int:
        return sum(outcome.failing for outcome in self.outcomes)

    @property
    def repaired(self) -> int:
        return sum(outcome.failing and outcome.repaired for outcome in self.outcomes)


def with_drift(repair: Repair, drift: Drift, reference: Reference) -> Repair:
    """The repair with its patch's drift on a reference, written into the patch's record too."""
    if repair.patch is None:
        return repair
    return replace(repair, patch=recorded(repair.patch, drift, reference), drift=drift)


def recorded(patch: Patch, drift: Drift, reference: Reference) -> Patch:
    """The patch with its drift on a reference in its record."""
    record = {"kl": drift.kl, "agreement": drift.agreement, "tokens": drift.tokens, "reference": reference.name}
    return replace(patch, made=replace(patch.made, drift=record))
