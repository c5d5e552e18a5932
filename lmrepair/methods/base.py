"""What a repair method is: fields are its settings, ``solve`` turns a problem into a change of neurons.

torch is imported for types only, here and in every method: the command line reads the fields to make
its options, and ``--help`` must not wait for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from lmrepair.errors import UsageError
from lmrepair.methods.targeting import PATTERNS

if TYPE_CHECKING:
    from torch import Tensor

    from lmrepair.failures import Tokens
    from lmrepair.methods.maths import Bases, Way

    Lead = tuple[Callable[[float], Mapping[int, Tensor]], float]
    from lmrepair.model import Asked, Batch, Delta, Metric, Net, Preference, Reading, Sites

MOMENTS = ("auto", "full", "sampled", "diagonal", "none")
MODES = ("iterative", "batch", "multi-failure")
LAYERS = (
    "layers to write to: one, 1/4, … by the loss with their FFN skipped; last; upper 1/2; auto: all, "
    "by minkl the upper half (at least 12) for one failure"
)
ROOM = 1 << 32  # bytes that a solve of several failures may keep, or ROOMS times what the model takes; beyond, groups
ROOMS = 4


@dataclass(frozen=True)
class Problem:
    """One step's input: the failures as read now, where to write, and the change so far.

    ``focus`` [N] (bool) marks the target positions the step is about. ``deltas`` is the whole change since
    the start, layer → [k, d], in the form that the method answers in (at first a tensor); ``step`` counts
    from 0; ``memory`` is what the last step left (at step 0, what the mistake before left, where mistakes of
    one failure follow each other); ``metric`` is made from the statistics the method asks for. ``probe`` says
    how far a whole change moves the model: mean KL(before ‖ after), nats per token, on a few positions of
    reference text; it writes the change to the trial.
    """

    net: Net
    batches: tuple[Batch, ...]
    sites: Sites
    reading: Reading
    focus: Tensor
    deltas: Mapping[int, Any]
    bases: Bases
    step: int
    memory: Any = None
    metric: Metric | None = None
    probe: Callable[[Mapping[int, Any]], float] | None = None


@dataclass(frozen=True)
class Step:
    """A method's answer: the whole change from now on, layer → [k, d] float32 or factors, and what to remember."""

    deltas: Mapping[int, Delta]
    memory: Any = None


def setting(default: Any, text: str, choices: tuple[str, ...] = (), positive: bool = False) -> Any:
    """A dataclass field with the help and the choices that its command-line option shows.

    A ``positive`` number must be above 0 (a whole one at least 1) and finite.
    """
    return field(default=default, metadata={"help": text, "choices": choices, "positive": positive})


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A repair method. Final classes below it hold settings only; the loop in ``loop.py`` runs them."""

    name: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    undoes: ClassVar[bool] = False  # whether a problem that is not solved after ``epochs`` steps is left as it was
    steers: ClassVar[bool] = False  # whether it reads semantic bases
    advice: ClassVar[str] = "try more epochs, a larger share or learning rate, or repair it --alone"

    epochs: int = setting(10, "most steps for one problem", positive=True)
    rounds: int = setting(10, "most rounds over failures worked on in turn (one without --early)", positive=True)
    early: bool = setting(True, "stop as soon as every position is preferred")
    margin: float = setting(0.0, "by how many logits a position must be preferred to count as done")
    mode: str = setting("multi-failure", "what one problem holds", MODES)
    max_probe_kl: float = setting(
        1.0, "nats per token on a few positions beyond which a model is being destroyed: stop, undo; inf: never"
    )

    def __post_init__(self) -> None:
        for spec in fields(self):
            value, choices = getattr(self, spec.name), spec.metadata.get("choices")
            if choices and value not in choices:
                raise UsageError(f"{spec.name} {value!r} is unknown; known: {', '.join(choices)}")
            if spec.metadata.get("positive") and not 0 < value < float("inf"):
                raise UsageError(
                    f"{spec.name} is {value}; expected {'at least 1' if spec.type == 'int' else 'a number above 0'}"
                )
        if not 0 <= self.margin < float("inf"):
            raise UsageError(f"margin is {self.margin}; expected a number of logits, 0 or more")
        if not self.max_probe_kl > 0:
            raise UsageError(
                f"max_probe_kl is {self.max_probe_kl}; expected nats per token above 0, or inf for no limit"
            )

    def suited(self, net: Net, failures: int) -> Method:  # noqa: ARG002
        """The method for a problem of so many failures, where a setting is left to what is asked."""
        return self

    def asks(self) -> Asked | None:
        """The statistics of reference text this method needs; most need none."""
        return None

    def read(
        self, net: Net, batches: Sequence[Batch], sites: Sites, focus: Tensor | None, margin: float | None,
        memory: Any = None,  # noqa: ARG002
    ) -> Reading:  # fmt: skip
        """What a step is solved from; a method that needs no gradient, or another one, reads in its own way.

        ``margin`` is None where all steps are to be made; else the reading says whether every position in
        ``focus`` [N] (None: all) is preferred by more than that. ``memory`` is what the step before left.
        """
        return net.read(batches, sites, focus, margin)

    def sites(self, net: Net, batches: Sequence[Batch], preference: Preference) -> Sites:  # noqa: ARG002
        """The neurons that may be written to, chosen once, from what is preferred before the repair."""
        return net.every_site()

    def fixed_sites(self, net: Net) -> Sites | None:  # noqa: ARG002
        """The same, where no mistake has to be known for it: then the first reading tells the mistakes as well."""
        return None

    def memory(self, net: Net, tokens: Sequence[Tokens], sites: Sites) -> int:  # noqa: ARG002
        """Bytes that a solve for these failures may keep at most, where that grows with their number; else 0."""
        return 0

    def groups(self, net: Net, tokens: Sequence[Tokens], sites: Sites) -> list[list[Tokens]]:
        """The failures of each problem, in order.

        Where failures are solved together that is all of them, unless it keeps more than ROOM bytes (or ROOMS times
        the model's): then as many as that holds, one group after another. What is asked decides, not what is free,
        so that a patch is the same on another day.
        """
        if self.mode != "multi-failure":
            return [[item] for item in tokens]
        most = max(ROOM, ROOMS * net.bytes)
        found: list[list[Tokens]] = []
        for item in tokens:
            if found and self.memory(net, [*found[-1], item], sites) <= most:
                found[-1].append(item)
            else:
                found.append([item])
        return found

    def needed(self, net: Net, tokens: Sequence[Tokens], sites: Sites) -> int:
        """Bytes that the largest group keeps at most."""
        return max((self.memory(net, group, sites) for group in self.groups(net, tokens, sites)), default=0)

    @abstractmethod
    def solve(self, problem: Problem) -> Step:
        """The change after one more step."""

    def settings(self) -> dict[str, Any]:
        """The fields as plain values, as a patch records them; no limit is null."""
        found = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        return {name: None if value == float("inf") else value for name, value in found.items()}


@dataclass(frozen=True, kw_only=True)
class Targeted(Method):
    """A method that writes to a share of the layers and neurons, the ones with most to do with the mistakes."""

    layers: str = setting("1", LAYERS)
    pattern: str = setting("even", "where neurons are chosen", PATTERNS)
    share: str = setting("1", "share of neurons to write to, by attribution: 1, 1/4, 1/16, …")

    def sites(self, net: Net, batches: Sequence[Batch], preference: Preference) -> Sites:
        from lmrepair.methods.targeting import Targeting, locate

        return locate(net, batches, preference, Targeting(self.layers, self.pattern, self.share))

    def fixed_sites(self, net: Net) -> Sites | None:
        from lmrepair.methods.targeting import Targeting, fixed_sites

        return fixed_sites(net, Targeting(self.layers, self.pattern, self.share))


@dataclass(frozen=True, kw_only=True)
class Preferring(Method):
    """A method whose steps are made from what is preferred now and nothing else: it takes gradients when it solves."""

    def read(
        self, net: Net, batches: Sequence[Batch], sites: Sites, focus: Tensor | None, margin: float | None,  # noqa: ARG002
        memory: Any = None,  # noqa: ARG002
    ) -> Reading:  # fmt: skip
        from lmrepair.model import Reading

        preference = net.prefer(batches)
        return Reading(preference, margin is not None and preference.holds(focus, margin))


@dataclass(frozen=True)
class Paces:
    """What steps of no fixed size leave: the size of each layer's weights, and the last step's way."""

    units: Mapping[int, float]
    way: Way


@dataclass(frozen=True, kw_only=True)
class Paced(Targeted):
    """A method whose steps have a direction, and a size that is found by what they do or given.

    With a ``learning_rate`` of 0 a step is as long as the loss is to fall by its slope, and shorter where that would
    move the model by more than ``stride`` on the probe: ``maths/optimiser.py``.
    """

    learning_rate: float = setting(0.0, "fixed size of a step; 0: found by what the step does to loss and probe")
    stride: float = setting(
        0.01, "nats per token that a step of no fixed size may add on the probe; less, as they add up", positive=True
    )
    descent: float = setting(0.5, "share of the loss that a step of no fixed size is to take away", positive=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.learning_rate < float("inf"):
            raise UsageError(f"learning_rate is {self.learning_rate}; expected a number above 0, or 0 to have it found")

    def paced(self, problem: Problem, known: Paces | None, lead: Callable[[Mapping[int, float]], Lead]) -> Paces:
        """One more step of no fixed size; the last one again, shorter, if the loss has risen since.

        ``lead`` says which way to go: from the sizes of the layers' weights to the change at a length along it, and
        how fast the loss falls.
        """
        from lmrepair.methods.maths import Way, again, go, stride_after, units

        loss, probe = float(problem.reading.preference.loss[problem.focus].mean()), probe_of(problem)
        if known is not None and not loss <= known.way.loss:
            return replace(known, way=again(known.way, probe, stride_after(known.way.kl, self.stride)))
        sizes = known.units if known is not None else units(problem.net, problem.sites)
        at, slope = lead(sizes)
        kl = known.way.reached if known is not None else probe(problem.deltas)
        return Paces(sizes, go(Way(at, slope, loss, kl), probe, self.descent, stride_after(kl, self.stride)))


def margin_needs_early(method: Method) -> None:
    """Refuse a margin that no step would look at. Raises UsageError."""
    if method.margin and not method.early:
        raise UsageError(
            f"margin is {method.margin} but every one of the {method.epochs} steps is to be made, whatever is "
            "preferred; set --early (early=True), or leave the margin out"
        )


def metric_of(problem: Problem) -> Metric:
    """The metric of a problem whose method asks for one. Raises UsageError where none was made."""
    if problem.metric is None:
        raise UsageError("the method needs statistics of reference text; repair() gathers them")
    return problem.metric


def probe_of(problem: Problem) -> Callable[[Mapping[int, Tensor]], float]:
    """The probe of a problem whose steps are measured. Raises UsageError where there is none."""
    if problem.probe is None:
        raise UsageError("a step of no fixed size needs a probe; repair() makes one, or set a learning_rate")
    return problem.probe
