"""Copies of folders and files: reflinks or hard links where there are any, whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lmrepair.errors import ModelError, UsageError
from lmrepair.failures import flush, umask

BLOCK = 1 << 23  # bytes copied at once
_FICLONE = 0x40049409  # Linux: one file shares the other's blocks until either is written to
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def files_of(folder: Path) -> list[Path]:
    """Every file in a folder, however deep, relative to it; links to files count as files.

    Raises ModelError for what is neither file nor folder, such as a link that leads nowhere.
    """
    found: list[Path] = []
    above = {folder.resolve()}

    def walk(at: Path) -> None:
        for entry in sorted(os.scandir(at), key=lambda entry: entry.name):
            path = Path(entry.path)
            if entry.is_dir():
                real = path.resolve()
                if real in above:
                    raise ModelError(f"{path} is a link to a folder that holds it; expected a folder that ends")
                above.add(real)
                walk(path)
                above.discard(real)
            elif entry.is_file():
                found.append(path.relative_to(folder))
            else:
                raise ModelError(f"{path} is neither a file nor a folder (a link that leads nowhere?); take it away")

    walk(folder)
    return found


def duplicate(source: Path, target: Path, link: bool) -> None:
    """Give ``target`` the bytes of ``source``: a reflink or hard link with ``link``, where possible; else a copy.

    What a link leads to is never linked again: it belongs to a cache.
    """
    if link:
        if _reflink(source, target):
            return
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    copy_bytes(source, target)


def _reflink(source: Path, target: Path) -> bool:
    try:
        import fcntl

        with source.open("rb") as read, target.open("wb") as written:
            fcntl.ioctl(written.fileno(), _FICLONE, read.fileno())
        shutil.copystat(source, target)
        return True
    except (OSError, ImportError):
        target.unlink(missing_ok=True)
        return False


def copy_bytes(source: Path, target: Path) -> None:
    """Copy a file a block at a time, holes as holes, with its mode and times, and flush it."""
    with source.open("rb") as read, target.open("wb") as written:
        size = os.fstat(read.fileno()).st_size
        for start, end in _segments(read.fileno(), size):
            read.seek(start)
            written.seek(start)
            while start < end:
                part = read.read(min(BLOCK, end - start))
                if not part:
                    raise ModelError(f"{source} became shorter while it was read; nothing was written")
                written.write(part)
                start += len(part)
        written.truncate(size)
        written.flush()
        os.fsync(written.fileno())
    shutil.copystat(source, target)
    target.chmod(target.stat().st_mode | 0o200)


def _segments(handle: int, size: int) -> Iterator[tuple[int, int]]:
    """The parts of a file that hold data; the whole of it where the file system does not say."""
    at = 0
    while at < size:
        try:
            start = os.lseek(handle, at, os.SEEK_DATA)
            end = os.lseek(handle, start, os.SEEK_HOLE)
        except (OSError, AttributeError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENXIO:  # nothing but a hole is left
                return
            start, end = at, size
        yield start, end
        at = end


@contextmanager
def beside(output: Path) -> Iterator[Path]:
    """A folder next to ``output`` to fill; it is taken away again unless ``place_folder`` has moved it."""
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=output.absolute().parent, prefix=f".{output.name}."))
    temporary.chmod(0o777 & ~umask())
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def place_folder(filled: Path, output: Path) -> None:
    """Give a filled folder its name in one step; what had the name before is then in ``filled``'s place, or gone.

    Raises UsageError where the file system cannot swap two folders and there is one to be replaced.
    """
    for folder in [filled, *(path for path in filled.rglob("*") if path.is_dir())]:
        flush(folder)
    if output.is_dir() and any(output.iterdir()):
        _exchange(filled, output)
    else:
        os.replace(filled, output)
    flush(output.absolute().parent)


def _exchange(one: Path, other: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise UsageError(f"this system cannot swap {other} for its new state in one step; write to another --output")
    names = (os.fsencode(one.absolute()), os.fsencode(other.absolute()))
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise UsageError(f"{other} cannot be swapped for its new state in one step ({reason}); use another --output")


def replace_file(filled: Path, target: Path) -> None:
    """Put a written and flushed file in another's place, in one step."""
    os.replace(filled, target)
    flush(target.absolute().parent)


@contextmanager
def said_in_one_line(target: Path) -> Iterator[None]:
    """A full disk, a limit on file sizes or a missing right as one line; by then everything is as it was."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{target} cannot be written ({reason}); everything is as it was") from error


def refuse_short_of_space(folder: Path, needed: int) -> None:
    """Raise UsageError before the work where the disk has no room for ``needed`` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UsageError(
            f"the disk of {folder.absolute().parent} has {free / 1e6:,.1f} MB free, {needed / 1e6:,.1f} MB are to be "
            "written; everything is as it was"
        )
