"""What the commands about patches share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lmrepair.cli.starting import dtype_of, load_net
from lmrepair.errors import UsageError

if TYPE_CHECKING:
    from lmrepair.model import Net
    from lmrepair.patch import Patch

Copy = Annotated[bool, typer.Option("--copy", help="Copy unchanged files too, where they would be linked.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists, in one step.")]


def load_for(patch: Patch, model: str | None, device: str, dtype: str, trust: bool) -> Net:
    """A patch's model, in what the user says, or in what the patch was made in."""
    return load_net(model, device, dtype_of(dtype, patch), 0, trust)


def needed(model: str | None) -> str:
    if model is None:
        raise UsageError("which model? name the one the patch was made for with --model")
    return model


def untouched(patch: Patch, model: str, device: str, dtype: str, trust: bool) -> Net:
    """The model a patch was made for, checked bit for bit, without the patch."""
    net = load_for(patch, model, device, dtype, trust)
    if patch.is_applied(net):
        patch.revert(net)
    return net
