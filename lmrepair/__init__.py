"""lmrepair: repair language models the way engineers repair programs.

The public names, below, are imported when they are first used, so that ``import lmrepair`` is instant.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any


def door(room: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package that lists its names as imports under ``if TYPE_CHECKING``.

    A name is imported when it is first used: what needs no torch does not wait for it.
    """

    @cache
    def homes() -> dict[str, str]:
        tree = ast.parse(Path(str(sys.modules[room].__file__)).read_text(encoding="utf-8"))
        found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0]
        return {
            alias.name: str(node.module)
            for node in found
            for alias in node.names
            if str(node.module).startswith("lmrepair.") and alias.asname == alias.name
        }

    def named(name: str) -> Any:
        if name not in homes():
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        return getattr(import_module(homes()[name]), name)

    return named, lambda: sorted(homes())


if TYPE_CHECKING:
    from lmrepair.diagnosis import Diagnosis as Diagnosis, Mistake as Mistake, diagnose as diagnose
    from lmrepair.errors import (
        FailuresError as FailuresError,
        LmrepairError as LmrepairError,
        ModelError as ModelError,
        PatchError as PatchError,
        UsageError as UsageError,
        WrongModelError as WrongModelError,
    )
    from lmrepair.failures import (
        Failure as Failure,
        Protected as Protected,
        Reference as Reference,
        Template as Template,
        Wordings as Wordings,
        read_failures as read_failures,
        read_protected as read_protected,
        read_reference as read_reference,
    )
    from lmrepair.loop import (
        Gate as Gate,
        Gated as Gated,
        Outcome as Outcome,
        Repair as Repair,
        repair as repair,
        repair_each as repair_each,
    )
    from lmrepair.measure import (
        Answer as Answer,
        Drift as Drift,
        Scores as Scores,
        answers as answers,
        evaluate as evaluate,
        measure_drift as measure_drift,
        measure_drift_by_kind as measure_drift_by_kind,
        scores as scores,
    )
    from lmrepair.methods import (
        AlphaEdit as AlphaEdit,
        Direct as Direct,
        Emmet as Emmet,
        FineTune as FineTune,
        Lora as Lora,
        Memit as Memit,
        Method as Method,
        MinKl as MinKl,
        Mint as Mint,
        Rome as Rome,
        Sgd as Sgd,
        Star as Star,
    )
    from lmrepair.model import Net as Net, load as load, ranks as ranks, statistics_of as statistics_of
    from lmrepair.patch import Patch as Patch

__getattr__, __dir__ = door(__name__)
__all__ = __dir__()
