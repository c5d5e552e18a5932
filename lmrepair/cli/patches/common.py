"""What the commands about patches share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lmrepair.cli.options import LoadOptions
from lmrepair.cli.starting import load_net
from lmrepair.errors import UsageError

if TYPE_CHECKING:
    from lmrepair.model import Net
    from lmrepair.patch import Patch

Copy = Annotated[bool, typer.Option("--copy", help="Copy unchanged files too, where they would be linked.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists, in one step.")]


def needed(model: str | None) -> str:
    if model is None:
        raise UsageError("which model? name the one the patch was made for with --model")
    return model


def untouched(patch: Patch, model: str, loading: LoadOptions) -> Net:
    """The model a patch was made for, checked bit for bit, without the patch."""
    net = load_net(model, loading.for_patch(patch))
    if patch.is_applied(net):
        patch.revert(net)
    return net
