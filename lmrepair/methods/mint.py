"""MINT: Model Improvement via Neuron Targeting (arXiv 2312.05356). The maths: docs/methods.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar

from lmrepair.errors import ModelError
from lmrepair.methods.base import Preferring, Problem, Step, setting

if TYPE_CHECKING:
    from torch import Tensor

    from lmrepair.model import Batch, Net, Preference, Sites

NEGLIGIBLE = 1e-6  # share of a drift that is left by rounding alone where earlier drifts span it


@dataclass(frozen=True)
class _Memory:
    """Candidate (layer, neuron) pairs of the present mistake, and orthonormal rows [n, d] that span drifts.

    ``before``: of the patches for earlier mistakes; ``used``: with those for the present one.
    """

    candidates: tuple[tuple[int, int], ...]
    before: Tensor
    used: Tensor


@dataclass(frozen=True, kw_only=True)
class Mint(Preferring):
    """One mistake after another, one neuron after another, each chosen by trying it.

    A patch moves one neuron w to (w + factor·drift) / (1 + factor). Of the candidates, the one whose
    trial leaves the least p(said) − p(wanted) is patched for good, until ``wanted`` is preferred. A
    mistake that is not solved after ``epochs`` patches is left as it was.
    """

    name: ClassVar[str] = "mint"
    steers: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"factor": 0.01, "epochs": 10, "candidates": 10, "rank_by": "attribution", "variant": "delta",
                  "orthogonal": False, "early": True, "margin": 0.0, "rounds": 1},
    }  # fmt: skip
    undoes: ClassVar[bool] = True
    advice: ClassVar[str] = "try a larger factor, more epochs or candidates, or another method"

    mode: str = setting("iterative", "what one problem holds", ("iterative",))
    rounds: int = setting(1, "most rounds over failures worked on in turn (one without --early)", positive=True)
    factor: float = setting(0.01, "weight of the drift in a patched neuron, its old value weighing 1", positive=True)
    candidates: int = setting(10, "neurons that are tried for each patch", positive=True)
    rank_by: str = setting("attribution", "how candidates are ranked", ("attribution", "activation", "random"))
    variant: str = setting("delta", "what a neuron drifts to", ("delta", "basis"))
    orthogonal: bool = setting(False, "make a drift orthogonal to those of the failure's earlier mistakes")
    seed: int = setting(0, "seed of random candidates (MINT) or adapters (LoRA)")

    def sites(self, net: Net, batches: Sequence[Batch], preference: Preference) -> Sites:  # noqa: ARG002
        """Every neuron of the upper half of the layers."""
        from lmrepair.model import Sites

        every = net.every_site().columns
        return Sites({layer: every[layer] for layer in range(net.layers // 2, net.layers)})

    def solve(self, problem: Problem) -> Step:
        """One more neuron patch for the first position in focus."""
        row = int(problem.focus.nonzero()[0])
        memory: _Memory = self._begin(problem, row) if problem.step == 0 else problem.memory
        drifts = self._drifts(problem, row, memory.before)
        outcomes = {
            (layer, neuron): _tried(problem, row, layer, neuron, self._move(problem, drifts, layer, neuron))
            for layer, neuron in memory.candidates
        }
        layer, neuron = min(outcomes, key=outcomes.__getitem__)
        changed = problem.deltas[layer].clone()
        changed[neuron] += self._move(problem, drifts, layer, neuron)
        used = _spanned(memory.used, drifts[layer])
        return Step({**problem.deltas, layer: changed}, replace(memory, used=used))

    def _begin(self, problem: Problem, row: int) -> _Memory:
        import torch

        earlier = problem.memory.used if problem.memory is not None else None
        width, device = problem.net.hidden, problem.reading.preference.gap.device
        before = torch.zeros(0, width, dtype=torch.float64, device=device) if earlier is None else earlier
        return _Memory(self._candidates(problem, row), before, before)

    def _candidates(self, problem: Problem, row: int) -> tuple[tuple[int, int], ...]:
        """The best (layer, neuron) pairs over all sites, best first."""
        import torch

        layers = problem.sites.layers
        places = [(layer, neuron) for layer in layers for neuron in range(problem.net.widths[layer])]
        if self.rank_by == "random":
            return tuple(Random(f"{self.seed}/{row}").sample(places, min(self.candidates, len(places))))
        scored = _attribution if self.rank_by == "attribution" else _activation
        scores = scored(problem, row)
        order = torch.cat([scores[layer] for layer in layers]).argsort(descending=True, stable=True)
        return tuple(places[index] for index in order[: self.candidates].tolist())

    def _drifts(self, problem: Problem, row: int, before: Tensor) -> dict[int, Tensor]:
        """Layer → drift [d], float64: without what ``before`` [n, d] spans, divided by its range."""
        import torch

        batch, at = _located(problem, row)
        wanted, said = batch.wanted[at : at + 1], problem.reading.preference.rival[row : row + 1]
        if self.variant == "basis":
            start, end = _embedded(problem.net, batch.tokens[int(batch.owner[at])].prompt[-1]), problem.bases[wanted][0]
        else:
            end = problem.bases.steers(wanted, said)[0]
            start = torch.zeros_like(end)
        drifts = {}
        for layer in problem.sites.layers:
            whole = start + (layer + 1) / problem.net.layers * (end - start)
            drift = whole - before.T @ (before @ whole) if self.orthogonal else whole
            span = drift.max() - drift.min()
            spent = bool(drift.norm() <= NEGLIGIBLE * whole.norm())
            drifts[layer] = torch.zeros_like(drift) if spent else drift / span
        return drifts

    def _move(self, problem: Problem, drifts: Mapping[int, Tensor], layer: int, neuron: int) -> Tensor:
        """What a patch adds to a neuron [d]: (w + factor·drift) / (1 + factor) − w, in float32."""
        weight = problem.net.columns(layer)[neuron].double()
        return (self.factor / (1.0 + self.factor) * (drifts[layer] - weight)).float()


def _located(problem: Problem, row: int) -> tuple[Batch, int]:
    """The batch that holds a target position, and its index there."""
    for batch in problem.batches:
        if row < len(batch.rows):
            return batch, row
        row -= len(batch.rows)
    raise IndexError(row)


def _tried(problem: Problem, row: int, layer: int, neuron: int, move: Tensor) -> float:
    """p(said) − p(wanted) with one neuron moved; its bits are put back."""
    import torch

    from lmrepair.model import Sites, Trial

    batch, at = _located(problem, row)
    place = Sites({layer: torch.tensor([neuron])})
    with Trial(problem.net, place) as trial, torch.inference_mode():
        trial.write({layer: move[None]})
        chances = problem.net.logits(batch, batch.rows[at : at + 1])[0].double().softmax(dim=0)
    return float(chances[problem.reading.preference.rival[row]] - chances[batch.wanted[at]])


def _attribution(problem: Problem, row: int) -> dict[int, Tensor]:
    """Layer → |z·∂p(wanted)/∂z| [m] at one position."""
    import torch

    from lmrepair.diagnosis import attributions

    preference = problem.reading.preference
    one = -torch.ones_like(preference.gap)
    one[row] = 1.0
    return attributions(problem.net, problem.batches, replace(preference, gap=one), problem.sites.layers)


def _activation(problem: Problem, row: int) -> dict[int, Tensor]:
    """Layer → |z| [m] at one position."""
    import torch

    batch, at = _located(problem, row)
    layers = problem.sites.layers
    with torch.no_grad(), problem.net.watch(layers) as watched:
        problem.net.logits(batch, batch.rows[at : at + 1])
    flat = {layer: watched.inputs[layer].reshape(-1, problem.net.widths[layer]) for layer in layers}
    return {layer: z[batch.rows[at]].double().abs() for layer, z in flat.items()}


def _embedded(net: Net, token: int) -> Tensor:
    """What the model's input embedding gives for a token, [d] in float64."""
    import torch

    with torch.inference_mode():
        found: Tensor = (
            net.model.get_input_embeddings()(torch.tensor([token], device=net.device))[0].to(net.device).double()
        )
    if found.shape != (net.hidden,):
        raise ModelError(
            f"input embeddings are {found.shape[-1]} wide, the states {net.hidden}; the basis variant of MINT "
            "interpolates between the two: use --variant delta"
        )
    return found


def _spanned(rows: Tensor, drift: Tensor) -> Tensor:
    """Orthonormal rows [n, d] that span the given ones and, if it is not among them, the drift."""
    import torch

    rest = drift - rows.T @ (rows @ drift)
    if bool(rest.norm() <= NEGLIGIBLE * drift.norm()):
        return rows
    return torch.cat([rows, (rest / rest.norm())[None]])
