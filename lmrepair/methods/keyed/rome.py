"""ROME (arXiv 2202.05262) and EMMET (2403.14236): values met exactly at one layer. The maths: docs/methods.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lmrepair.methods.base import Problem, setting
from lmrepair.methods.keyed.keyed import Keyed, at_one_layer

if TYPE_CHECKING:
    from lmrepair.methods.maths import Apply
    from lmrepair.model import Delta


@dataclass(frozen=True, kw_only=True)
class Rome(Keyed):
    """One failure after another: the rank-one change of least cost on reference text that gives its key its value."""

    name: ClassVar[str] = "rome"

    mode: str = setting("batch", "what one problem holds", ("batch",))

    def changes(self, problem: Problem, metrics: Mapping[int, Apply]) -> dict[int, Delta]:
        return at_one_layer(self, problem, metrics, 0.0)


@dataclass(frozen=True, kw_only=True)
class Emmet(Keyed):
    """All failures in one solve: the change of least cost on reference text that gives every key its value."""

    name: ClassVar[str] = "emmet"

    ridge: float = setting(1e-4, "slack of the solve, as a share of its system's mean diagonal", positive=True)

    def changes(self, problem: Problem, metrics: Mapping[int, Apply]) -> dict[int, Delta]:
        return at_one_layer(self, problem, metrics, self.ridge)
