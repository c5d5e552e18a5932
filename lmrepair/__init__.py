"""lmrepair: repair language models the way engineers repair programs.

The public names, below, are imported when they are first used, so that ``import lmrepair`` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmrepair.diagnosis import Diagnosis, Mistake, diagnose
    from lmrepair.drift import Drift, Reference, measure_drift, measure_drift_by_kind, read_reference
    from lmrepair.errors import (
        FailuresError,
        LmrepairError,
        ModelError,
        PatchError,
        UsageError,
        WrongModelError,
    )
    from lmrepair.evaluation import Answer, Scores, answers, evaluate, scores
    from lmrepair.failures import Failure, Template, read_failures
    from lmrepair.gate import Gate, Protected, read_protected
    from lmrepair.gating import Gated
    from lmrepair.loading import load
    from lmrepair.loop import repair, repair_each
    from lmrepair.methods import (
        AlphaEdit,
        Direct,
        Emmet,
        FineTune,
        Lora,
        Memit,
        Method,
        MinKl,
        Mint,
        Rome,
        Sgd,
        Star,
    )
    from lmrepair.net import Net
    from lmrepair.outcome import Outcome, Repair
    from lmrepair.patch import Patch
    from lmrepair.wordings import Wordings

_HOME = {
    "errors": ("FailuresError", "LmrepairError", "ModelError", "PatchError", "UsageError", "WrongModelError"),
    "failures": ("Failure", "Template", "read_failures"),
    "net": ("Net",),
    "loading": ("load",),
    "patch": ("Patch",),
    "diagnosis": ("Diagnosis", "Mistake", "diagnose"),
    "drift": ("Drift", "Reference", "measure_drift", "measure_drift_by_kind", "read_reference"),
    "gate": ("Gate", "Protected", "read_protected"),
    "gating": ("Gated",),
    "wordings": ("Wordings",),
    "methods": (
        "AlphaEdit",
        "Direct",
        "Emmet",
        "FineTune",
        "Lora",
        "Memit",
        "Method",
        "MinKl",
        "Mint",
        "Rome",
        "Sgd",
        "Star",
    ),  # fmt: skip
    "outcome": ("Outcome", "Repair"),
    "loop": ("repair", "repair_each"),
    "evaluation": ("Answer", "Scores", "answers", "evaluate", "scores"),
}
_MODULES = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "AlphaEdit",
    "Answer",
    "Diagnosis",
    "Direct",
    "Drift",
    "Emmet",
    "Failure",
    "FailuresError",
    "FineTune",
    "Gate",
    "Gated",
    "LmrepairError",
    "Lora",
    "Memit",
    "Method",
    "MinKl",
    "Mint",
    "Mistake",
    "ModelError",
    "Net",
    "Outcome",
    "Patch",
    "PatchError",
    "Protected",
    "Reference",
    "Repair",
    "Rome",
    "Scores",
    "Sgd",
    "Star",
    "Template",
    "UsageError",
    "Wordings",
    "WrongModelError",
    "answers",
    "diagnose",
    "evaluate",
    "load",
    "measure_drift",
    "measure_drift_by_kind",
    "read_failures",
    "read_protected",
    "read_reference",
    "repair",
    "repair_each",
    "scores",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lmrepair' has no attribute {name!r}")
    return getattr(import_module(f"lmrepair.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
