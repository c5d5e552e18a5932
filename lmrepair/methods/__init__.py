"""The repair methods by name. Adding one: a file, a line here, a row in the tests' table, a section in the docs."""

from __future__ import annotations

from dataclasses import fields

from lmrepair.errors import UsageError, nearest
from lmrepair.methods.base import Method, Problem, Step, Targeted
from lmrepair.methods.direct import Direct
from lmrepair.methods.finetune import FineTune
from lmrepair.methods.keyed import AlphaEdit, Emmet, Memit, Rome
from lmrepair.methods.lora import Lora
from lmrepair.methods.minkl import MinKl
from lmrepair.methods.mint import Mint
from lmrepair.methods.sgd import Sgd
from lmrepair.methods.star import Star
from lmrepair.methods.targeting import Targeting

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Star, MinKl, Direct, Rome, Emmet, Memit, AlphaEdit, Mint, Sgd, FineTune, Lora)
}
DEFAULT = MinKl.name

__all__ = [
    "DEFAULT", "METHODS", "AlphaEdit", "Direct", "Emmet", "FineTune", "Lora", "Memit", "Method", "MinKl",
    "Mint", "Problem", "Rome", "Sgd", "Star", "Step", "Targeted", "Targeting", "method_named",
]  # fmt: skip


def method_named(name: str, preset: str | None = None, /, **settings: object) -> Method:
    """A method by its name, with a preset's settings and then the given ones. Raises UsageError."""
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}; {nearest(name, METHODS)}")
    kind = METHODS[name]
    if preset is not None and preset not in kind.presets:
        having = [other.name for other in METHODS.values() if preset in other.presets]
        every = {known for other in METHODS.values() for known in other.presets}
        advice = f"these have it: {', '.join(having)}" if having else nearest(preset, kind.presets or every)
        raise UsageError(f"method {name!r} has no preset {preset!r}; {advice}")
    known = [spec.name for spec in fields(kind)]
    for key in settings:
        if key not in known:
            raise UsageError(f"method {name!r} has no setting {key!r}; {nearest(key, known)}")
    return kind(**{**(kind.presets[preset] if preset else {}), **settings})
