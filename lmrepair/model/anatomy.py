"""Where a causal language model is made: its head, final norm and FFN output projections.

Everything is found by shape and by behaviour on a short probe; there is no table of model names. An
FFN output projection is the matrix of a block that (1) writes the hidden width, (2) is read by no
other matrix of its block, and (3) is fed position by position: a nudge of the matrices beside it at
one position reaches its input there and nowhere else, where attention would spread it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lmrepair.errors import ModelError

LENGTH, POSITION = 8, 3  # of the probe, and where it is nudged
NUDGE = 4.0  # in units of the root mean square of what is nudged
NEGLIGIBLE = 1e-3  # share of the largest change below which a position counts as unchanged


@dataclass(frozen=True)
class Anatomy:
    """The places of a model that repair reads and writes.

    ``head`` has a weight [vocabulary, hidden]; ``gain`` [hidden] (float32) is what the final norm
    multiplies a normalised state by, and ``norm`` that norm, if the head reads just what it writes;
    ``projections`` holds each layer's FFN output projection, found
    under ``names``; ``widths`` are their numbers of neurons.
    """

    head: nn.Module
    gain: Tensor
    norm: nn.Module | None
    projections: tuple[nn.Module, ...]
    names: tuple[str, ...]
    widths: tuple[int, ...]
    hidden: int
    vocabulary: int
    context: int | None


def find(model: nn.Module) -> Anatomy:
    """Place the parts of a decoder-only causal LM, or raise ModelError with what was looked for."""
    _refuse_uneditable(model)
    head = _head(model)
    stack_name, blocks = _stack(model)
    with torch.no_grad():
        probe = _Probe(model, head, blocks)
        _refuse_bidirectional(probe)
        hidden = probe.hidden
        vocabulary, width = weight(head).shape
        if width != hidden:
            raise ModelError(
                f"the head reads states of width {width}, the blocks write {hidden}; expected one width "
                "(a projection between them hides where a token comes from)"
            )
        gain, norm = _gain(probe)
        found = _projections(probe, stack_name)
    names = tuple(found)
    modules = tuple(found.values())
    if len({weight(module).data_ptr() for module in modules}) < len(modules):
        raise ModelError("layers share one FFN output projection; expected one of its own in each layer")
    config: Any = model.config
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return Anatomy(
        head=head,
        gain=gain,
        norm=norm,
        projections=modules,
        names=names,
        widths=tuple(probe.inputs[module].shape[-1] for module in modules),
        hidden=hidden,
        vocabulary=vocabulary,
        context=getattr(text_config, "max_position_embeddings", None),
    )


def _refuse_uneditable(model: nn.Module) -> None:
    if getattr(model.config, "quantization_config", None) is not None or getattr(model, "is_quantized", False):
        raise ModelError(
            "the model is quantised; its weights cannot be patched: load it in float32, bfloat16 or float16"
        )
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta" or getattr(parameter, "_hf_hook", None) is not None:
            raise ModelError(f"{name} is offloaded; an edit would do nothing: load the model whole on one device")
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ModelError(f"{name} is {parameter.dtype}; quantised weights cannot be patched: load float weights")
    for name, module in model.named_modules():
        if getattr(getattr(module, "_hf_hook", None), "offload", False):
            raise ModelError(f"{name} is offloaded; an edit would do nothing: load the model whole on one device")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError("the model is an encoder-decoder; expected a decoder-only causal language model")


def _head(model: nn.Module) -> nn.Module:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter else None
    found = getattr(head, "weight", None)
    if not isinstance(head, nn.Module) or not isinstance(found, Tensor) or found.dim() != 2:
        raise ModelError("no language-model head found: expected get_output_embeddings() with a weight [V, d]")
    return head


def weight(module: nn.Module) -> Tensor:
    """A module's weight, as stored, without gradients."""
    found: Tensor = module.weight.detach()  # type: ignore[operator]
    return found


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _stack(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The one outermost list of blocks that hold matrices."""
    stacks: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in stacks)
        blocks = list(module) if isinstance(module, nn.ModuleList) and not inside else []
        if blocks and all(any(_is_matrix(part) for part in block.modules()) for block in blocks):
            stacks[name] = blocks
    if len(stacks) != 1:
        raise ModelError(
            f"found {len(stacks)} stacks of blocks with matrices ({', '.join(stacks) or 'none'}); "
            "expected one decoder stack"
        )
    ((name, blocks),) = stacks.items()
    return name, blocks


def _first(value: Any) -> Tensor:
    tensor = value[0] if isinstance(value, tuple | list) else value
    if not isinstance(tensor, Tensor):
        raise ModelError(f"a block returned {type(value).__name__}; expected its hidden states")
    return tensor


class _Probe:
    """Runs of one short text through the model: one as it is, the others with each block on its own.

    In the others every block gives its output of the first run to the next, so that what is changed
    inside a block shows in that block alone.
    """

    def __init__(self, model: nn.Module, head: nn.Module, blocks: list[nn.Module]) -> None:
        self.model, self.blocks = model, blocks
        vocabulary, device = len(weight(head)), weight(head).device
        self.ids = ((torch.arange(LENGTH) * 7 + 5) % vocabulary)[None].to(device)
        self.matrices = [{name: part for name, part in block.named_modules() if _is_matrix(part)} for block in blocks]
        self.inputs: dict[nn.Module, Tensor] = {}
        self.outputs: dict[nn.Module, Tensor] = {}
        watched = [part for parts in self.matrices for part in parts.values()] + [head, *blocks]
        gains = [
            part
            for part in model.modules()
            if isinstance(getattr(part, "weight", None), Tensor) and weight(part).dim() == 1
        ]
        self.norms: list[tuple[nn.Module, Tensor]] = []

        def norm_ran(module: nn.Module, _: Any, output: Any) -> None:
            self.norms.append((module, _first(output)))

        with ExitStack() as hooks:
            self._record(hooks, watched, self.inputs, self.outputs)
            for part in gains:
                hooks.enter_context(_removed(part.register_forward_hook(norm_ran)))
            self.logits = self._forward(self.ids)
        self.state = self.inputs[head]
        self.hidden = self.outputs[blocks[0]].shape[-1]

    def _forward(self, ids: Tensor) -> Tensor:
        try:
            output = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise ModelError(f"the model does not run on plain token ids ({error}); expected a causal LM") from error
        if not isinstance(getattr(output, "logits", None), Tensor):
            raise ModelError("the model returns no logits; expected a causal language model")
        logits: Tensor = output.logits
        return logits

    @staticmethod
    def _record(
        hooks: ExitStack, modules: list[nn.Module], inputs: dict[nn.Module, Tensor], outputs: dict[nn.Module, Tensor]
    ) -> None:
        def ran(module: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
            given = arguments[0] if arguments else next(iter(keywords.values()))
            inputs[module], outputs[module] = given, _first(output)

        for module in modules:
            hooks.enter_context(_removed(module.register_forward_hook(ran, with_kwargs=True)))

    def rerun(
        self,
        before: Mapping[nn.Module, Callable[[Tensor], Tensor]],
        after: Mapping[nn.Module, Callable[[Tensor], Tensor]],
    ) -> tuple[dict[nn.Module, Tensor], dict[nn.Module, Tensor]]:
        """Inputs and outputs of the matrices and blocks, with some matrices' inputs or outputs changed."""
        inputs: dict[nn.Module, Tensor] = {}
        outputs: dict[nn.Module, Tensor] = {}

        def hold(block: nn.Module, _: Any, output: Any) -> Any:
            outputs[block] = _first(output)
            kept = self.outputs[block]
            return type(output)([kept, *output[1:]]) if isinstance(output, tuple | list) else kept

        with ExitStack() as hooks:
            for module, change in before.items():
                pre = module.register_forward_pre_hook(lambda _, given, change=change: (change(given[0]), *given[1:]))
                hooks.enter_context(_removed(pre))
            for module, change in after.items():
                post = module.register_forward_hook(lambda _, __, output, change=change: change(output))
                hooks.enter_context(_removed(post))
            self._record(hooks, [part for parts in self.matrices for part in parts.values()], inputs, outputs)
            for block in self.blocks:
                hooks.enter_context(_removed(block.register_forward_hook(hold)))
            self._forward(self.ids)
        return inputs, outputs

    def by_position(self, tensor: Tensor) -> Tensor | None:
        """[LENGTH, width] of what a module saw, or None where it did not see every position once."""
        if tensor.numel() == 0 or tensor.numel() // tensor.shape[-1] != LENGTH:
            return None
        return tensor.reshape(LENGTH, -1).float()

    def changed(self, now: Tensor, before: Tensor) -> list[int] | None:
        """The positions at which a tensor differs from what it was."""
        new, old = self.by_position(now), self.by_position(before)
        if new is None or old is None:
            return None
        change = (new - old).abs().amax(dim=1)
        largest = float(change.max())
        return [at for at in range(LENGTH) if change[at] > NEGLIGIBLE * largest] if largest > 0 else []


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _refuse_bidirectional(probe: _Probe) -> None:
    other = probe.ids.clone()
    other[0, -1] = (other[0, -1] + 1) % probe.logits.shape[-1]
    change = (probe._forward(other) - probe.logits).float().abs().amax(dim=-1)[0]
    if float(change[:-1].max()) > NEGLIGIBLE * float(change.max()):
        raise ModelError(
            "the model reads tokens that come later (an encoder); expected a causal language model, "
            "which predicts left to right"
        )


def _nudge(tensor: Tensor) -> Tensor:
    """The tensor with its values at POSITION moved, by a pattern that is the same in every run."""
    flat = tensor.reshape(-1, tensor.shape[-1]).clone()
    pattern = torch.cos(torch.arange(flat.shape[-1], device=flat.device) * 1.7 + 0.3).to(flat.dtype)
    flat[POSITION] += NUDGE * pattern * flat.float().pow(2).mean().sqrt().clamp(min=1e-3).to(flat.dtype)
    return flat.reshape(tensor.shape)


def _projections(probe: _Probe, stack_name: str) -> dict[str, nn.Module]:
    """Dotted name → FFN output projection, one for each block."""
    writers = [_last_writers(probe, index) for index in range(len(probe.blocks))]
    found: dict[str, nn.Module] = {}
    for index, names in enumerate(writers):
        pointwise = [name for name in names if _is_pointwise(probe, index, name)]
        where = f"{stack_name}.{index}"
        if len(pointwise) != 1:
            raise ModelError(
                f"{where} has {len(pointwise)} candidates for its FFN output projection "
                f"({', '.join(pointwise) or 'none'}); expected exactly one matrix that writes width {probe.hidden} "
                "to the residual stream and is fed position by position. Mixtures of experts and "
                "state-space blocks are not supported"
            )
        found[f"{where}.{pointwise[0]}"] = probe.matrices[index][pointwise[0]]
    return found


def _last_writers(probe: _Probe, index: int) -> list[str]:
    """Matrices of a block that write the hidden width and are read by no other matrix of the block."""
    block, parts = probe.blocks[index], probe.matrices[index]
    for name, parameter in block.named_parameters():
        if parameter.dim() == 3 and min(parameter.shape) > 1 and probe.hidden in parameter.shape:
            raise ModelError(
                f"{name} is a stack of matrices (a mixture of experts); expected one dense FFN in each block"
            )
    seen = {name: part for name, part in parts.items() if part in probe.inputs}
    if len(seen) < len(parts) or any(probe.by_position(probe.inputs[part]) is None for part in seen.values()):
        raise ModelError("some matrices of a block do not see every token (a mixture of experts); expected a dense FFN")
    names = []
    for name, part in seen.items():
        if probe.outputs[part].shape[-1] != probe.hidden:
            continue
        inputs, outputs = probe.rerun({}, {part: _nudge})
        read = any(probe.changed(inputs[other], probe.inputs[other]) for other in parts.values() if other is not part)
        if not read and probe.changed(outputs[block], probe.outputs[block]) == [POSITION]:
            names.append(name)
    return names


def _is_pointwise(probe: _Probe, index: int, name: str) -> bool:
    """Whether a nudge of the matrices beside this one, at one position, reaches its input there alone."""
    part = probe.matrices[index][name]
    parent = name.rpartition(".")[0]
    beside = [
        other for key, other in probe.matrices[index].items() if key.rpartition(".")[0] == parent and other is not part
    ]
    readers = [other for other in beside if probe.inputs[other].shape[-1] == probe.hidden]
    if not readers:
        return False
    inputs, _ = probe.rerun(dict.fromkeys(readers, _nudge), {})
    return probe.changed(inputs[part], probe.inputs[part]) == [POSITION]


def _gain(probe: _Probe) -> tuple[Tensor, nn.Module | None]:
    """What the final norm multiplies a normalised state by, [hidden] float32, measured on the norm itself; the norm."""
    for norm, output in reversed(probe.norms):
        if output.shape != probe.state.shape:
            continue
        given, made = probe.state.float(), output.float()
        scale = float((given * made).sum() / made.pow(2).sum())
        if torch.allclose(given, scale * made, rtol=1e-2, atol=1e-3 * float(given.abs().max())):
            return scale * _measured_gain(norm, probe.hidden), norm if torch.equal(output, probe.state) else None
    last = probe.outputs[probe.blocks[-1]]
    if last.shape == probe.state.shape and torch.equal(last, probe.state):
        return torch.ones(probe.hidden), None
    raise ModelError("no final norm found: expected the head to read the last state, or a norm of it")


def _measured_gain(norm: nn.Module, hidden: int) -> Tensor:
    # On ±x of mean zero, layer norm and RMS norm agree, and half the difference has no bias left.
    x = torch.ones(hidden)
    x[1::2] = -1.0
    if hidden % 2:
        x[-3:] = torch.tensor([1.0, 1.0, -2.0])
    norm = copy.deepcopy(norm).float().cpu()
    both = norm(torch.stack([x, -x])[None] * 100)[0].float()
    normalised = x / x.pow(2).mean().sqrt()
    gain: Tensor = (both[0] - both[1]) / 2 / normalised
    return gain
