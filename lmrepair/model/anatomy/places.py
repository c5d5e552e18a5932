"""The places of a model: head, final norm, one FFN in each block; or why there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lmrepair.errors import ModelError, NotFiniteError
from lmrepair.model.anatomy.gathered import around, refuse_other_weights
from lmrepair.model.anatomy.mixtures import is_matrix
from lmrepair.model.anatomy.norm import Norm, could_be_norms, final_norm, norm_behind
from lmrepair.model.anatomy.probe import LENGTH, NEGLIGIBLE, Probe, first_infinite, weight
from lmrepair.model.anatomy.projections import ffns
from lmrepair.model.anatomy.stacks import Place

ROUNDING = 1024  # in last places of the largest logit: more than rounding changes a logit by


@dataclass(frozen=True)
class Anatomy:
    """The places of a model that repair reads and writes.

    ``head`` has a weight [vocabulary, hidden]; ``gain`` [hidden] (float32) is what the final norm
    multiplies a normalised state by, and ``norm`` that norm, if the head reads just what it writes;
    ``behind``: the norm between each layer's FFN and the stream, where there is one;
    ``ffns`` are the layers' FFNs, where their neurons are; ``around``: what puts the weights of norm and
    head together, where these are there only while the model runs.
    """

    head: nn.Module
    gain: Tensor
    norm: nn.Module | None
    behind: tuple[Norm | None, ...]
    ffns: tuple[Place, ...]
    hidden: int
    vocabulary: int
    context: int | None
    around: tuple[FSDPModule, ...]

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """What writes each layer's FFN output: its one matrix, or the mixture that holds its experts."""
        return tuple(place.module for place in self.ffns)

    @property
    def names(self) -> tuple[str, ...]:
        """Under which names ``projections`` are in the model."""
        return tuple(place.name for place in self.ffns)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Each layer's number of neurons, those of all its experts together."""
        return tuple(place.width for place in self.ffns)


def find(model: nn.Module) -> Anatomy:
    """Place the parts of a decoder-only causal LM, or raise ModelError with what was looked for.

    Takes a handful of forward passes of a short text, however deep the model. The model is put back as it was.
    """
    _refuse_uneditable(model)
    head = _head(model)
    stacks = _stacks(model)
    with torch.no_grad():
        every = {f"{name}.{at}": block for name, blocks in stacks.items() for at, block in enumerate(blocks)}
        probe = Probe(model, head, every, could_be_norms(model))
        _refuse_infinite(model, probe)
        _refuse_bidirectional(probe)
        stack, blocks = _stack(probe, stacks)
        hidden = probe.clean[blocks[0]][0].made.shape[-1]
        vocabulary, width = weight(head).shape
        if width != hidden:
            raise ModelError(
                f"the head reads states of width {width}, the blocks write {hidden}; expected one width "
                "(a projection between them hides where a token comes from)"
            )
        gain, norm = final_norm(probe, probe.clean[head][-1].given, blocks[-1], hidden)
        found = ffns(probe, stack, blocks, hidden)
        behind = tuple(
            norm_behind(probe, probe.clean[place.module][-1].made, block)
            for place, block in zip(found, blocks, strict=True)
        )
    config: Any = model.config
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return Anatomy(
        head=head,
        gain=gain,
        norm=norm,
        behind=behind,
        ffns=tuple(found),
        hidden=hidden,
        vocabulary=vocabulary,
        context=getattr(text_config, "max_position_embeddings", None),
        around=around(model, blocks, probe.owners),
    )


def _refuse_uneditable(model: nn.Module) -> None:
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError("the model is an encoder-decoder; expected a decoder-only causal language model")
    advice = "quantised weights cannot be patched: load the float checkpoint, or a GGUF file"
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta" or getattr(parameter, "_hf_hook", None) is not None:
            raise ModelError(f"{name} is offloaded; an edit would do nothing: load the model whole on one device")
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ModelError(f"{name} is {parameter.dtype}; {advice}")
        if is_traceable_wrapper_subclass(parameter.data) and not isinstance(parameter.data, DTensor):
            raise ModelError(f"{name} is packed ({type(parameter.data).__name__}); {advice}")
    for name, buffer in model.named_buffers():
        if buffer.dtype in (torch.int8, torch.int32) and buffer.dim() > 1 and min(buffer.shape) > 1:
            raise ModelError(f"{name} holds packed {buffer.dtype} weights; {advice}")
    for name, module in model.named_modules():
        if getattr(getattr(module, "_hf_hook", None), "offload", False):
            raise ModelError(f"{name} is offloaded; an edit would do nothing: load the model whole on one device")
    refuse_other_weights(model)


def _head(model: nn.Module) -> nn.Module:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter else None
    found = getattr(head, "weight", None)
    if not isinstance(head, nn.Module) or not isinstance(found, Tensor) or found.dim() != 2:
        raise ModelError("no language-model head found: expected get_output_embeddings() with a weight [V, d]")
    return head


def _stacks(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The outermost lists of blocks that hold matrices."""
    stacks: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in stacks)
        blocks = list(module) if isinstance(module, nn.ModuleList) and not inside else []
        if blocks and all(any(is_matrix(part) for part in block.modules()) for block in blocks):
            stacks[name] = blocks
    return stacks


def _stack(probe: Probe, stacks: dict[str, list[nn.Module]]) -> tuple[str, Sequence[nn.Module]]:
    """The one stack that runs on text: those of other senses (images, sound) do not."""
    ran = {name: blocks for name, blocks in stacks.items() if any(block in probe.clean for block in blocks)}
    if len(ran) != 1:
        raise ModelError(
            f"found {len(ran)} stacks of blocks with matrices ({', '.join(ran) or 'none'}); expected one decoder stack"
        )
    ((name, blocks),) = ran.items()
    for at, block in enumerate(blocks):
        calls = len(probe.clean.get(block, ()))
        if calls != 1:
            raise ModelError(f"{name}.{at} runs {calls} times in one pass; expected every block to run once")
    return name, blocks


def _refuse_infinite(model: nn.Module, probe: Probe) -> None:
    if not bool(probe.logits.amax(dim=-1).isfinite().all()):
        where = first_infinite(model, lambda: probe.forward(probe.ids))
        raise NotFiniteError(not_finite(where, next(model.parameters()).dtype))


def not_finite(where: str, dtype: torch.dtype) -> str:
    """What to say of a model whose logits are no finite numbers, ``where`` being the first part to write such."""
    first = f"; the first to write NaN or infinity is {where}" if where else ""
    advice = "load it in float32 or bfloat16" if dtype == torch.float16 else "the checkpoint or the patch is damaged"
    return f"the model's logits are no finite numbers in {str(dtype).removeprefix('torch.')}{first}; {advice}"


def _refuse_bidirectional(probe: Probe) -> None:
    half = LENGTH // 2
    other = probe.ids.clone()
    other[0, half:] = probe.ids[0, :half]
    change = (probe.forward(other) - probe.logits).float().abs().amax(dim=-1)[0]
    # An encoder that hardly looks around changes little, but more than what rounding does to a mixture
    # whose experts are handed other tokens beside the same ones.
    rounding = ROUNDING * torch.finfo(probe.logits.dtype).eps * float(probe.logits.abs().max())
    if float(change[:half].max()) > min(NEGLIGIBLE * float(change.max()), rounding):
        raise ModelError(
            "the model reads tokens that come later (an encoder); expected a causal language model, "
            "which predicts left to right"
        )
