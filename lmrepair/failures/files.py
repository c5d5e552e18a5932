"""Files that ship, and files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from lmrepair.errors import UsageError


def write_atomically(path: Path, data: bytes | Callable[[Path], None]) -> None:
    """Write a file whole or not at all, and flush it and its folder to the disk; ``data``: its bytes, or what writes
    them to a file that is there. Where ``path`` is a link, what it leads to is written.

    Raises UsageError for a path that is there and no file: a device would be replaced by one.
    """
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is there and is no file; expected the name of a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            if isinstance(data, bytes):
                file.write(data)
            else:
                data(Path(temporary))
        os.chmod(temporary, 0o666 & ~umask())
        flush(Path(temporary))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    flush(path.parent)


def shipped(name: str) -> Path:
    """A file or folder that ships in the package, by its name there."""
    return Path(str(files("lmrepair") / "model" / "embedded")) / name


def flush(path: Path) -> None:
    """Have the system write a file, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def umask() -> int:
    """The process's file mode mask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
