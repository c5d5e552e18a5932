"""The weights of a checkpoint that no patch touches, compared with what a patch was made for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lmrepair.errors import WrongModelError
from lmrepair.model import quietly
from lmrepair.patch.disk.placing import Placed, untouched
from lmrepair.patch.disk.stored import Checkpoint, Stored
from lmrepair.patch.patch import Patch

# What building a model from a config of unknown making can raise.
FAULTS = (OSError, ValueError, LookupError, ImportError, RuntimeError, TypeError, AttributeError, AssertionError)


def compare_others(checkpoint: Checkpoint, patch: Patch, placed: Mapping[int, Placed], trust: bool) -> str:
    """Compare the body's digest, tensor by tensor from the disk; says how much could be compared.

    A patch's fingerprint has the names that the model has in memory. An empty model (on ``meta``) gives these;
    a checkpoint with a weight under another name, or in a form that is changed when it is loaded, cannot be
    compared in this way. Raises WrongModelError if all weights have their counterparts and differ.
    """
    if patch.fingerprint.experts:
        return "what the patch changes and every mixture of experts"
    partly = "every FFN output projection"
    names = _names_in_memory(checkpoint, trust)
    projections = {one.stored.name for one in (*placed.values(), *untouched(checkpoint, patch, placed).values())}
    if names is None or len(projections) != len(patch.fingerprint.layers):
        return partly
    found: dict[str, Stored] = {}
    for name, twins in names.items():
        stored = [checkpoint.tensors[one] for one in _as_stored(checkpoint, (name, *twins))]
        if not stored or stored[0].torch_dtype is None:
            return partly
        found[name] = stored[0]
    body = {name: stored for name, stored in found.items() if stored.name not in projections}
    as_they_are = all(stored.torch_dtype == patch.dtype for stored in body.values())
    # Loaded tensor by tensor in the dtype stored, or all in one dtype.
    for dtype in (None,) if as_they_are else (None, patch.dtype):
        parts = (f"{name} {stored.digest(dtype)}" for name, stored in sorted(body.items()))
        if hashlib.sha256("\n".join(parts).encode()).hexdigest() == patch.fingerprint.body:
            return "every weight"
    if as_they_are:
        raise WrongModelError(f"the patch was made for {patch.made.model!r}; the weights of this model are others")
    return partly


def _as_stored(checkpoint: Checkpoint, names: tuple[str, ...]) -> list[str]:
    """The names on the disk for a weight: its own, a tied one's, or the one that ends with it or that it ends with."""
    exact = [name for name in names if name in checkpoint.tensors]
    if exact:
        return exact
    return [
        stored
        for stored in checkpoint.tensors
        if any(stored.endswith("." + name) or name.endswith("." + stored) for name in names)
    ]


def _names_in_memory(checkpoint: Checkpoint, trust: bool) -> dict[str, tuple[str, ...]] | None:
    """Every weight of the model by name, with the names of those it is tied to; None where it cannot be built."""
    build: Any = AutoModelForCausalLM
    try:
        with quietly(), torch.device("meta"):
            config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust)
            model = build.from_config(config, trust_remote_code=trust, attn_implementation="eager")
            model.tie_weights()
    except FAULTS:
        return None
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    twins = {name: tuple(other for other in group if other != name) for group in tied.values() for name in group}
    return {name: twins.get(name, ()) for name in model.state_dict()}
