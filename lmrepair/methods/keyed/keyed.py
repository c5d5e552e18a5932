"""What ROME, EMMET, MEMIT and AlphaEdit share: keys, values, and the settings for both."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lmrepair.errors import UsageError
from lmrepair.methods.base import MOMENTS, Preferring, Problem, Step, metric_of, setting
from lmrepair.methods.targeting import share_of

if TYPE_CHECKING:
    from lmrepair.methods.keyed.values import Search
    from lmrepair.methods.maths import Apply
    from lmrepair.model import Asked, Batch, Delta, Net, Preference, Sites

SPARE = 1.0  # logits that a value aims beyond the margin: the change is felt at other positions too


@dataclass(frozen=True, kw_only=True)
class Keyed(Preferring):
    """A method that changes what FFNs write at one key position a failure: the last token of its prompt.

    A step finds the value for every key (a shift of one layer's FFN output after which the target is
    preferred), and solves in closed form for the change of the weights that brings it about. Later steps
    do the same for what is still mistaken, on top.
    """

    advice: ClassVar[str] = (
        "only the prompt's last token is a key, so tokens late in a target may stay out of reach: "
        "try another depth, more values, or another method"
    )

    fine: ClassVar[bool] = False  # whether 16 bits are too few for the neurons' side of its factors

    epochs: int = setting(3, "most steps for one problem", positive=True)
    depth: float = setting(0.3, "where the last layer written to lies: 0 the model's first layer, 1 its last")
    values: int = setting(25, "most steps of the search for a value", positive=True)
    value_rate: float = setting(0.5, "Adam's rate there, in units of the FFN's output", positive=True)
    decay: float = setting(0.03, "weight of the value's mean square in its search")
    clamp: float = setting(4.0, "largest value, in units of the FFN's output", positive=True)
    essence: float = setting(0.0625, "weight, in that search, of the KL after the key's token without its context")
    inputs: str = setting("auto", "how the coefficients' second moment is kept", MOMENTS)
    samples: int = setting(512, "reference positions that sampled moments keep", positive=True)
    damping: float = setting(0.01, "added to the moments, as a share of their mean diagonal", positive=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.depth <= 1:
            raise UsageError(f"depth is {self.depth}; expected 0 (the first layer) to 1 (the last)")
        for name in ("decay", "essence"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} is {getattr(self, name)}; expected a number, 0 or more")

    def asks(self) -> Asked:
        from lmrepair.model import Asked

        return Asked(self.inputs, "none", self.samples, self.damping)

    def sites(self, net: Net, batches: Sequence[Batch], preference: Preference) -> Sites:  # noqa: ARG002
        """Every neuron of the layers written to."""
        from lmrepair.model import Sites

        every = net.every_site().columns
        return Sites({layer: every[layer] for layer in self.layers_of(net)})

    def layers_of(self, net: Net) -> list[int]:
        """The one layer at ``depth``; a method that spreads its change names several, ending there."""
        return [round(self.depth * (net.layers - 1))]

    def solve(self, problem: Problem) -> Step:
        from lmrepair.model import grown

        metrics = problem.memory if problem.memory is not None else self.metrics(problem)
        changes = self.changes(problem, metrics)
        return Step({layer: grown(problem.deltas[layer], changes[layer]) for layer in problem.deltas}, metrics)

    def metrics(self, problem: Problem) -> dict[int, Apply]:
        """Layer → M; C⁻¹ unless a method says otherwise."""
        from lmrepair.methods.maths import inverse_metric

        metric = metric_of(problem)
        return {layer: inverse_metric(metric.inputs[layer]) for layer in problem.sites.layers}

    @abstractmethod
    def changes(self, problem: Problem, metrics: Mapping[int, Apply]) -> dict[int, Delta]:
        """Layer → what a step adds to the neurons, [m, d]."""

    def search(self) -> Search:
        from lmrepair.methods.keyed.values import Search

        return Search(self.values, self.value_rate, self.decay, self.clamp, self.essence, self.margin + SPARE)


def at_one_layer(method: Keyed, problem: Problem, metrics: Mapping[int, Apply], ridge: float) -> dict[int, Delta]:
    """All failures' keys and values in one solve at the one layer of a method; ``ridge``: of the mean diagonal."""
    import torch

    from lmrepair.methods.keyed.values import find_values, read_keys
    from lmrepair.methods.maths import Constraints

    (layer,) = problem.sites.layers
    keys, shifts = [], []
    for batch in problem.batches:
        keys.append(read_keys(problem.net, batch, (layer,), layer).keys[layer])
        shifts.append(find_values(problem.net, batch, layer, method.search()).shifts)
    constraints = Constraints.of({layer: torch.cat(keys)}, metrics)
    return constraints.changes(problem.net.dtype, torch.cat(shifts), ridge * constraints.scale, fine=method.fine)


def spread(
    method: Keyed, problem: Problem, metrics: Mapping[int, Apply], ridge: Callable[[float], float]
) -> dict[int, Delta]:
    """Values at the last layer, reached by all layers in turn.

    Each layer, lowest first, is asked for what the state is short of there, over the number of layers
    left, at the keys as they are after the layers below were changed. ``ridge`` gives ε for a system's
    mean diagonal.
    """
    import torch

    from lmrepair.methods.keyed.values import find_values, read_keys
    from lmrepair.methods.maths import Constraints, in_stream, undone
    from lmrepair.model import Trial

    net, layers, top = problem.net, problem.sites.layers, problem.sites.layers[-1]
    wanted = [find_values(net, batch, top, method.search()).states for batch in problem.batches]
    changes: dict[int, Delta] = {}
    with Trial(net, problem.sites) as trial:
        for place, layer in enumerate(layers):
            now = [read_keys(net, batch, (layer,), top) for batch in problem.batches]
            short = torch.cat([state - item.states.float() for state, item in zip(wanted, now, strict=True)])
            keys, back = torch.cat([item.keys[layer] for item in now]), {}
            norm = net.anatomy.behind[layer]
            if norm is not None:
                keys, unit = in_stream(norm, keys, torch.cat([item.lengths[layer] for item in now]))
                back[layer] = undone(unit)
            constraints = Constraints.of({layer: keys}, metrics)
            part, slack = short / (len(layers) - place), ridge(constraints.scale)
            solved = constraints.changes(net.dtype, part, slack, fine=method.fine, undone=back)
            changes |= solved
            trial.write(solved)
    return changes


def spanned(net: Net, depth: float, span: str) -> list[int]:
    """The share ``span`` of the layers, ending at ``depth``; at least one. Raises UsageError."""
    top = round(depth * (net.layers - 1))
    count = max(1, math.ceil(share_of(span, "span") * net.layers))
    return list(range(max(0, top - count + 1), top + 1))
