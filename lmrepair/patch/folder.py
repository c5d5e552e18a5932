"""Model folders out: whole or not at all, and checked against what is in memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open

from lmrepair.errors import ModelError, UsageError
from lmrepair.failures import flush, umask
from lmrepair.model import Net, digest, quietly
from lmrepair.patch.disk import beside, place_folder, refuse_short_of_space, said_in_one_line


def refuse_existing(output: Path, force: bool = False) -> None:
    """Raise UsageError for an output folder that would overwrite something (``force``: that is no folder) or cannot
    be made."""
    if output.is_symlink() or (output.exists() and (not output.is_dir() or (not force and any(output.iterdir())))):
        raise UsageError(f"{output} exists already; expected a folder that is not there yet, so that nothing is lost")
    above = output.absolute().parent
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"{output} cannot be written: {above} is no folder to write in")


def save_model(net: Net, output: str | Path, force: bool = False) -> None:
    """Save model and tokenizer as a Hugging Face folder that appears under its name only when complete; ``force``: in
    the place of a folder that is there.

    Raises UsageError for an output that exists or cannot be written, ModelError if the saved FFN output projections
    are not, bit for bit, the net's.
    """
    output = Path(output)
    refuse_existing(output, force)
    with said_in_one_line(output), beside(output) as temporary:
        refuse_short_of_space(temporary, net.bytes)
        with quietly():
            net.model.save_pretrained(temporary)
            net.tokenizer.save_pretrained(temporary)
        _check(net, temporary)
        mask = umask()
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~mask)
                flush(file)
        place_folder(temporary, output)


def _check(net: Net, folder: Path) -> None:
    """Read the FFN output projections back. Their names on disk may have lost or gained a prefix.

    Experts may be stored one by one where the model holds a stack of them, under other names: each has to be found.
    """
    stacks = [stack for place in net.anatomy.ffns for stack in place.stacks]
    wanted = {stack.name: stack.stored.cpu() for stack in stacks}
    left = set(wanted)
    matrices: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as saved:
            for key in saved.keys():  # noqa: SIM118 (no mapping)
                match = [name for name in left if name == key or name.endswith("." + key) or key.endswith("." + name)]
                for name in match:
                    if not torch.equal(saved.get_tensor(key), wanted[name]):
                        raise ModelError(f"{key} was not saved as it is in memory; nothing was written")
                    left.discard(name)
            if any(wanted[name].dim() == 3 for name in left):
                matrices |= {digest(saved.get_tensor(key)) for key in saved.keys()}  # noqa: SIM118
    for name in sorted(left):
        experts = wanted[name] if wanted[name].dim() == 3 else ()
        if not len(experts) or not all({digest(one), digest(one.T)} & matrices for one in experts):
            raise ModelError(f"{name} is missing from the saved model, or not as in memory; nothing was written")
