"""What a repair method is: fields are its settings, ``solve`` turns a problem into a change of neurons.

torch is imported for types only, here and in every method: the command line reads the fields to make
its options, and ``--help`` must not wait for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from lmrepair.errors import UsageError
from lmrepair.targeting import PATTERNS

if TYPE_CHECKING:
    from torch import Tensor

    from lmrepair.basis import Bases
    from lmrepair.net import Batch, Net, Reading, Sites

MODES = ("iterative", "batch", "multi-failure")


@dataclass(frozen=True)
class Problem:
    """One step's input: the failures as read now, where to write, and the change so far.

    ``focus`` [N] (bool) marks the target positions the step is about. ``deltas`` is the whole change
    since the start, layer → [k, d]; ``step`` counts from 0; ``memory`` is what the last step left.
    """

    net: Net
    batches: tuple[Batch, ...]
    sites: Sites
    reading: Reading
    focus: Tensor
    deltas: Mapping[int, Tensor]
    bases: Bases
    step: int
    memory: Any = None


@dataclass(frozen=True)
class Step:
    """A method's answer: the whole change from now on, layer → [k, d] float32, and what to remember."""

    deltas: Mapping[int, Tensor]
    memory: Any = None


def setting(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with the help and the choices that its command-line option shows."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A repair method. Final classes below it hold settings only; the loop in ``loop.py`` runs them."""

    name: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    undoes: ClassVar[bool] = False  # whether a problem that is not solved after ``epochs`` steps is left as it was

    epochs: int = setting(10, "most steps for one problem")
    early: bool = setting(True, "stop as soon as every position is preferred")
    margin: float = setting(0.0, "by how many logits a position must be preferred to count as done")
    mode: str = setting("multi-failure", "what one problem holds", MODES)
    layers: str = setting("1", "share of layers to write to, by the loss with their FFN skipped: one, or 1/4, 1/2, …")
    pattern: str = setting("even", "where neurons are chosen", PATTERNS)
    share: str = setting("1", "share of neurons to write to, by attribution: 1, 1/4, 1/16, …")

    def __post_init__(self) -> None:
        for spec in fields(self):
            value, choices = getattr(self, spec.name), spec.metadata.get("choices")
            if choices and value not in choices:
                raise UsageError(f"{spec.name} {value!r} is unknown; known: {', '.join(choices)}")
        if self.epochs < 1:
            raise UsageError(f"epochs is {self.epochs}; expected at least 1")
        if not 0 <= self.margin < float("inf"):
            raise UsageError(f"margin is {self.margin}; expected a number of logits, 0 or more")

    def read(
        self, net: Net, batches: Sequence[Batch], sites: Sites, focus: Tensor | None, margin: float | None
    ) -> Reading:
        """What a step is solved from; a method that needs no gradient, or another one, reads in its own way.

        ``margin`` is None where all steps are to be made; else the reading says whether every position in
        ``focus`` [N] (None: all) is preferred by more than that.
        """
        return net.read(batches, sites, focus, margin)

    @abstractmethod
    def solve(self, problem: Problem) -> Step:
        """The change after one more step."""

    def settings(self) -> dict[str, Any]:
        """The fields as plain values, as a patch records them."""
        return {spec.name: getattr(self, spec.name) for spec in fields(self)}
