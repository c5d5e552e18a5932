"""Which engines can serve a patch of a model: each is asked as an export would ask it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lmrepair.errors import LmrepairError
from lmrepair.model import Net
from lmrepair.patch import Factors, Modules, known_architecture, peft_config, refuse_experts


@dataclass(frozen=True)
class Served:
    """``kind`` as ``export --to`` names it; ``refused`` says why not, empty where it can."""

    kind: str
    engines: str
    refused: str


def served(net: Net) -> tuple[Served, ...]:
    """The kinds of export, with the refusal of each. What a GGUF file was read from, llama.cpp runs."""
    kind = str(net.model.config.model_type)
    experts = _refusal(lambda: refuse_experts([at for at, place in enumerate(net.anatomy.ffns) if not place.dense]))
    known = "" if net.source.kind == "gguf" else _refusal(lambda: known_architecture(kind))
    return (
        Served("peft", "PEFT, vLLM", experts or _refusal(lambda: _peft(net))),
        Served("gguf", "llama.cpp", experts or known),
        Served("merged", "whatever runs the model", ""),
    )


def _refusal(ask: Callable[[], object]) -> str:
    try:
        ask()
    except LmrepairError as error:
        return str(error)
    return ""


def _peft(net: Net) -> object:
    """The adapter's config for a change of one neuron in every layer."""
    shapes = enumerate(net.widths)
    factors = Factors({layer: (torch.zeros(1, width), torch.zeros(net.hidden, 1)) for layer, width in shapes})
    return peft_config(factors, Modules.of(net))
