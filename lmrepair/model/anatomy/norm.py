"""Norms: the final one, which makes what the head reads, and those between an FFN and the stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmrepair.errors import ModelError
from lmrepair.model.anatomy.gathered import bare
from lmrepair.model.anatomy.probe import Probe, weight

FAR = 100.0  # times the length of a state: a norm puts out the same


@dataclass(frozen=True)
class Norm:
    """A norm, and the gain [d] (float32) by which it multiplies a normalised state."""

    module: nn.Module
    gain: Tensor


def could_be_norms(model: nn.Module) -> list[nn.Module]:
    """Modules with a gain, and leaves without parameters: some norms have none."""
    found = []
    for part in model.modules():
        gain = getattr(part, "weight", None)
        bare = not any(True for _ in part.children()) and not any(True for _ in part.parameters())
        if bare or (isinstance(gain, Tensor) and weight(part).dim() == 1):
            found.append(part)
    return found


def final_norm(probe: Probe, state: Tensor, last: nn.Module, hidden: int) -> tuple[Tensor, nn.Module | None]:
    """The gain [hidden] (float32), and the norm, if the head reads just what it writes.

    ``state`` is what the head reads, ``last`` the last block. Raises ModelError where the state is
    neither a norm of something nor what the last block put out.
    """
    for norm, seen in reversed(probe.norms):
        output = seen.made.to(state.device)
        scale = _scale(state, output)
        gain = None if scale is None else _gain(norm, hidden)
        if scale is not None and gain is not None:
            return scale * gain, norm if torch.equal(output, state) else None
    made = probe.clean[last][-1].made.to(state.device)
    if made.shape == state.shape and torch.equal(made, state):
        return torch.ones(hidden), None
    # A norm that is a function and no module has no gain.
    for plain in _normalised(made):
        scale = _scale(state, plain)
        if scale is not None:
            return scale * torch.ones(hidden), None
    raise ModelError("no final norm found: expected the head to read the last state, or a norm of it")


def norm_behind(probe: Probe, output: Tensor, block: nn.Module) -> Norm | None:
    """The norm in a block that reads an FFN's ``output`` before it is added to the stream; None where it is added as
    it is."""
    inside = set(block.modules())
    for norm, seen in probe.norms:
        alike = norm in inside and seen.given.shape == output.shape and torch.equal(seen.given, output)
        if alike and not torch.equal(seen.made, seen.given):  # dropout changes nothing here
            gain = _gain(norm, output.shape[-1])
            return None if gain is None else Norm(norm, gain)
    return None


def _scale(state: Tensor, output: Tensor) -> float | None:
    """The number by which the output was multiplied to make the state, or None if it was not made so."""
    if output.shape != state.shape or not output.is_floating_point():
        return None
    given, made = state.float(), output.float()
    scale = float((given * made).sum() / made.pow(2).sum().clamp(min=1e-30))
    near = torch.allclose(given, scale * made, rtol=1e-2, atol=1e-3 * float(given.abs().max()))
    return scale if near and scale > 0 else None


def _normalised(state: Tensor) -> Sequence[Tensor]:
    values = state.float()
    centred = values - values.mean(dim=-1, keepdim=True)
    return [x / x.pow(2).mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-6) for x in (values, centred)]


def _gain(norm: nn.Module, hidden: int) -> Tensor | None:
    """What a norm multiplies a normalised state by, [hidden], measured on it; None for what is no norm."""
    # On ±x of mean zero, layer norm and RMS norm agree, and half the difference has no bias left.
    device = next((part.device for part in norm.parameters()), torch.device("cpu"))
    x = torch.ones(hidden, device=device)
    x[1::2] = -1.0
    if hidden % 2:
        x[-3:] = torch.tensor([1.0, 1.0, -2.0], device=device)
    try:
        near, far = (
            bare(norm, torch.stack([x, -x])[None] * size, torch.float32)[0].float().cpu() for size in (FAR, FAR * FAR)
        )
    except (TypeError, RuntimeError, ValueError, IndexError):  # a bare leaf may want something else than states
        return None
    if near.shape != (2, hidden) or not torch.allclose(near, far, rtol=1e-2, atol=1e-2 * float(near.abs().max())):
        return None
    x = x.cpu()
    gain: Tensor = (near[0] - near[1]) / 2 / (x / x.pow(2).mean().sqrt())
    return gain
