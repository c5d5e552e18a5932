"""LoRA on the FFN output projections, with PEFT, until the failures are repaired: a yardstick.

The adapters are PEFT's, on a stand-in: one bare linear map for each layer, [k] → [d], with no weights of
its own. The stand-in's delta weight is what is written to the model, and the model's gradient with
respect to its weights is carried back through that delta weight to A and B (the chain rule; LoRA's
gradient exactly). So nothing is ever injected into the model, and nothing has to be taken out again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from lmrepair.errors import UsageError
from lmrepair.methods.base import Paced, Paces, Problem, Step, margin_needs_early, setting
from lmrepair.methods.maths import Moments, adam

if TYPE_CHECKING:
    from torch import Tensor

    from lmrepair.methods.base import Lead
    from lmrepair.model import Delta, Product

ADAPTER = "repair"


@dataclass(frozen=True)
class _Memory:
    """The stand-in, its adapters' values by name, Adam's moments, and the change that was there before them.
    ``factors``: those of it that a patch keeps; None where the adapters are not on whole layers, or the dtype has none.

    What the stand-in itself holds does not count: values are loaded into it before each use. Where a step's size
    was found, ``values`` are those at its start, ``moves`` its way, and ``paces`` says how far it went.
    """

    stand_in: Any
    values: Mapping[str, Tensor]
    moments: Moments | None
    before: Mapping[int, Tensor]
    factors: Mapping[int, Product] | None
    moves: Mapping[str, Tensor] | None = None
    paces: Paces | None = None

    @property
    def now(self) -> Mapping[str, Tensor]:
        if self.moves is None or self.paces is None:
            return self.values
        return _moved(self.values, self.moves, self.paces.way.length)

    def change(self, values: Mapping[str, Tensor], sizes: Mapping[int, float] | None) -> dict[int, Tensor]:
        """The whole change with these values, in units of the layers' ``sizes`` if there are any."""
        import torch

        with torch.no_grad():
            _load(_trained(self.stand_in), values)
            made = _deltas(self.stand_in)
            return {
                layer: self.before[layer] + (delta if sizes is None else sizes[layer] * delta)
                for layer, delta in made.items()
            }

    def kept(self, values: Mapping[str, Tensor], sizes: Mapping[int, float] | None) -> Mapping[int, Delta]:
        """The same as a patch keeps it: of whole layers the adapters' own factors, beside those that were before."""
        from lmrepair.model import Product

        if self.factors is None:
            return self.change(values, sizes)
        found: dict[int, Delta] = {}
        for layer in self.before:
            left, right = (values[f"{layer}.{part}.{ADAPTER}.weight"] for part in ("lora_A", "lora_B"))
            own = Product.of(left, right.T if sizes is None else sizes[layer] * right.T)
            found[layer] = self.factors[layer].plus(own) if layer in self.factors else own
        return found


@dataclass(frozen=True, kw_only=True)
class Lora(Paced):
    """Low-rank adaptation (arXiv 2106.09685): W + B·A with B [d, rank], A [rank, neurons], by Adam.

    Needs the extra ``lora``; ``solve`` raises UsageError without it.
    """

    name: ClassVar[str] = "lora"

    rank: int = setting(8, "rank of each layer's change", positive=True)
    epochs: int = setting(60, "most steps for one problem", positive=True)
    seed: int = setting(0, "seed of random candidates (MINT) or adapters (LoRA)")

    def __post_init__(self) -> None:
        super().__post_init__()
        margin_needs_early(self)

    def solve(self, problem: Problem) -> Step:
        memory: _Memory = problem.memory if problem.step else self._start(problem)
        if self.learning_rate:
            moves, moments = adam(_gradients(problem, memory, None), memory.moments, self.learning_rate)
            after = replace(memory, values=_moved(memory.values, moves, 1.0), moments=moments)
            return Step(after.kept(after.values, None), after)

        def lead(sizes: Mapping[int, float]) -> Lead:
            nonlocal memory
            gradients = _gradients(problem, memory, sizes)
            moves, moments = adam(gradients, memory.moments, 1.0)
            start = memory = replace(memory, values=memory.now, moves=moves, moments=moments, paces=None)
            fall = -sum(float((gradients[name] * move).sum()) for name, move in moves.items())
            return lambda length: start.change(_moved(start.values, moves, length), sizes), fall

        paces = self.paced(problem, memory.paces, lead)
        memory = replace(memory, paces=paces)
        return Step(memory.kept(memory.now, paces.units), memory)

    def _start(self, problem: Problem) -> _Memory:
        from lmrepair.model import DTYPES, Product, written_out

        adapters = _adapters(problem, self.rank, self.seed)
        values = {name: value.detach().clone() for name, value in _trained(adapters).items()}
        net, columns = problem.net, problem.sites.columns
        whole = net.dtype in DTYPES.values() and all(len(columns[at]) == net.widths[at] for at in columns)
        factors = {layer: delta for layer, delta in problem.deltas.items() if isinstance(delta, Product)}
        before = {layer: written_out(delta) for layer, delta in problem.deltas.items()}
        return _Memory(adapters, values, None, before, factors if whole else None)


def _gradients(problem: Problem, memory: _Memory, sizes: Mapping[int, float] | None) -> dict[str, Tensor]:
    """Of the loss by the adapters' values: the chain rule through PEFT's delta weight."""
    import torch

    parameters = _trained(memory.stand_in)
    with torch.enable_grad():
        _load(parameters, memory.now)
        made = _deltas(memory.stand_in)
        slopes = [problem.reading.gradients[layer] * (1.0 if sizes is None else sizes[layer]) for layer in made]
        found = torch.autograd.grad(list(made.values()), list(parameters.values()), slopes)
    return dict(zip(parameters, found, strict=True))


def _moved(values: Mapping[str, Tensor], moves: Mapping[str, Tensor], length: float) -> dict[str, Tensor]:
    return {name: value + length * moves[name] for name, value in values.items()}


def _trained(adapters: Any) -> dict[str, Tensor]:
    return {name: value for name, value in adapters.named_parameters() if value.requires_grad}


def _load(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.data.copy_(values[name])


def _adapters(problem: Problem, rank: int, seed: int) -> Any:
    """PEFT's adapters on the stand-in, initialised as PEFT does (A random by the seed, B zero)."""
    import torch
    from torch import nn

    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UsageError(
            "method 'lora' needs PEFT, which is not installed; pip install 'lmrepair[lora]', or choose another method"
        ) from error
    stand_in = nn.ModuleDict()
    for layer in problem.sites.layers:
        bare = nn.Linear(1, 1, bias=False, device="meta")
        bare.in_features, bare.out_features = len(problem.sites.columns[layer]), problem.net.hidden
        # Zeros of that shape that take the memory of one number: only the adapters matter.
        zeros = torch.zeros((), device=problem.net.device).expand(bare.out_features, bare.in_features)
        bare.weight = nn.Parameter(zeros, requires_grad=False)
        stand_in[str(layer)] = bare
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(stand_in))
    # PEFT draws on the CPU and then moves what it drew to where the weights are.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, stand_in, ADAPTER)
    return stand_in


def _deltas(adapters: Any) -> dict[int, Tensor]:
    """Layer → PEFT's delta weight, neuron-major [k, d]."""
    return {int(name): module.get_delta_weight(ADAPTER).T for name, module in adapters.items()}
