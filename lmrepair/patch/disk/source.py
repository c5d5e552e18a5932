"""Where a model's files lie."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from lmrepair.model import EMBEDDED, HUB


def folder_of(model: str) -> Path | None:
    """The folder of a model: its own, that of the model that ships, or the hub cache's; None where there is none."""
    if model == EMBEDDED:
        return Path(str(files("lmrepair") / "model" / "embedded" / "model"))
    if not model.startswith(HUB) and Path(model).exists():
        return Path(model) if Path(model).is_dir() else None
    try:
        return Path(huggingface_hub.snapshot_download(model.removeprefix(HUB), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
