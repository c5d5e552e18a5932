"""A patch written into a model folder, or taken back from one, without loading the model.

Every file is a copy of the source's, byte for byte; in the files that hold changed tensors only the bytes
of these differ. A process killed at any moment leaves the old state or the new one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lmrepair.errors import ModelError, UsageError
from lmrepair.model import Edit
from lmrepair.patch.disk.copies import (
    beside,
    copy_bytes,
    duplicate,
    files_of,
    place_folder,
    refuse_short_of_space,
    replace_file,
    said_in_one_line,
)
from lmrepair.patch.disk.experts import changed, place_experts
from lmrepair.patch.disk.others import compare_others
from lmrepair.patch.disk.placing import Placed, place, state_digest, write
from lmrepair.patch.disk.stored import Checkpoint, read_checkpoint
from lmrepair.patch.patch import Patch

Parts = Sequence[tuple[int, Edit, Placed]]  # layer, what is done there, and where that lies


@dataclass(frozen=True)
class Rewritten:
    """What was done: where, tensors by layer, files with changed bytes, and how much of the model was compared.

    ``compared``: "every weight", or "every FFN output projection" where the checkpoint's other weights have
    no counterpart by name in the model that transformers builds. ``stale``: files with weights in other
    formats, which are copied as they are.
    """

    output: Path
    tensors: Mapping[int, tuple[str, ...]]
    files: tuple[str, ...]
    compared: str
    stale: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return sorted(name for some in self.tensors.values() for name in some)


@dataclass(frozen=True)
class Writing:
    """How a folder is written: linked to the source where nothing changes, over an existing output, trusting code."""

    link: bool = True
    force: bool = False
    trust_remote_code: bool = False


def rewrite(source: Path, patch: Patch, revert: bool, output: Path | None, how: Writing | None = None) -> Rewritten:
    """Apply a patch to the checkpoint in ``source``, or take it back, into ``output`` (None: in place).

    Raises WrongModelError, ModelError or UsageError, with everything as it was; OtherDtypeError (a ModelError)
    where the checkpoint stores another dtype than the patch was made in.
    """
    how = how or Writing()
    checkpoint = read_checkpoint(source)
    placed = place(checkpoint, patch, patched=revert)
    parts = changed(place_experts(checkpoint, patch, patched=revert))
    compared = compare_others(checkpoint, patch, placed, how.trust_remote_code)
    parts += [(layer, patch.changes[layer], one) for layer, one in placed.items()]
    touched = sorted({one.stored.file for _, _, one in parts})
    if output is None:
        _in_place(checkpoint, parts, revert, how)
    else:
        refuse_output(source, output, how.force)
        with said_in_one_line(output):
            _write_folder(checkpoint, parts, revert, output, how)
    stale = tuple(sorted(path.name for kind in ("*.bin", "*.pt", "*.gguf") for path in source.glob(kind)))
    names = {layer: [one.stored.name for at, _, one in parts if at == layer] for layer in patch.changes}
    tensors = {layer: tuple(dict.fromkeys(some)) for layer, some in names.items()}
    return Rewritten(output or source, tensors, tuple(file.name for file in touched), compared, stale)


def refuse_output(source: Path, output: Path, force: bool) -> None:
    """Raise UsageError for an output that is the model in ``source``, in it or around it, or is there (``force``: a
    folder may be)."""
    if output.exists() and output.resolve() in (source.resolve(), *source.resolve().parents):
        raise UsageError(f"{output} is the model that is read, or holds it; use --in-place, or another --output")
    above = output.absolute().parent.resolve()
    if source.resolve() in (above, *above.parents):
        raise UsageError(f"{output} lies inside the model folder {source}; expected an --output beside it")
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UsageError(f"{output} exists already and is no folder; expected a folder that is not there yet")
    if output.exists() and any(output.iterdir()) and not force:
        raise UsageError(f"{output} exists already; expected a folder that is not there yet (--force replaces it)")


def _write_folder(checkpoint: Checkpoint, parts: Parts, revert: bool, output: Path, how: Writing) -> None:
    source = checkpoint.folder
    names = files_of(source)
    touched = {one.stored.file for _, _, one in parts}
    with beside(output) as temporary:
        needed = sum((source / name).stat().st_size for name in names if not how.link or source / name in touched)
        refuse_short_of_space(temporary, needed)
        for name in names:
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source / name not in touched:
                own = (source / name).resolve() == source.resolve() / name
                duplicate(source / name, target, how.link and own)
        for file in sorted(touched):
            _write_file(file, temporary / file.relative_to(source), parts, revert)
        place_folder(temporary, output)


def _in_place(checkpoint: Checkpoint, parts: Parts, revert: bool, how: Writing) -> None:
    """One changed file takes its old one's place; with several, a whole new folder takes the old one's."""
    folder = checkpoint.folder
    touched = sorted({one.stored.file for _, _, one in parts})
    linked = [file for file in touched if file.is_symlink()]
    if linked or folder.is_symlink():
        raise UsageError(f"{(linked or [folder])[0]} is a link into a cache or another folder; use --output")
    with said_in_one_line(folder):
        if len(touched) == 1:
            with beside(folder) as temporary:  # a killed run leaves nothing inside the folder
                refuse_short_of_space(temporary, touched[0].stat().st_size)
                written = temporary / touched[0].name
                _write_file(touched[0], written, parts, revert)
                replace_file(written, touched[0])
        else:
            _write_folder(checkpoint, parts, revert, folder, Writing(True, True, how.trust_remote_code))


def _write_file(source: Path, target: Path, parts: Parts, revert: bool) -> None:
    """A copy of a file with the changed neurons in it, read back and compared before anyone may see it."""
    copy_bytes(source, target)
    mine = [(change, one) for _, change, one in parts if one.stored.file == source]
    before: list[str | None] = []
    with target.open("r+b") as file:
        for change, one in mine:
            matrix = one.stored.read()
            before.append(state_digest(change, one.neurons(matrix), patched=revert))
            write(change, one.neurons(matrix), revert)
            file.seek(one.stored.start)
            file.write(matrix.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    for (change, one), was in zip(mine, before, strict=True):
        after = state_digest(change, one.read(target), patched=not revert)
        if after is None or after != was:
            raise ModelError(f"{one.stored.name} came back from the disk other than written; all is as it was")
    shutil.copymode(source, target)
