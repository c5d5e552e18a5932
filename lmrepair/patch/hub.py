"""Patches on the hub: files up with a card, ``hub:NAME`` down to the hub's own cache."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from lmrepair.errors import PatchError, UsageError
from lmrepair.model import HUB

FILE, CARD = "patch.safetensors", "README.md"
# Its parents are what the HTTP library below raises, whichever that is.
FAULTS: tuple[type[BaseException], ...] = (*HfHubHTTPError.__bases__, HFValidationError, OSError, ValueError)
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def on_hub(path: str | Path) -> str | None:
    """The repository that ``hub:OWNER/NAME`` names; None for a path. Raises UsageError for a name that is none."""
    text = str(path)
    return repository(text.removeprefix(HUB)) if text.startswith(HUB) else None


def repository(name: str) -> str:
    """The name, if it is one. Raises UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name on the hub; expected OWNER/NAME, as in hub:someone/fix-dates")
    return name


def fetched(path: str | Path) -> Path:
    """A patch's file: what ``hub:OWNER/NAME`` names, from the hub or its cache; any other path as it is.

    Raises PatchError where the hub has no such patch or does not answer.
    """
    name = on_hub(path)
    if name is None:
        return Path(path)
    try:
        return Path(huggingface_hub.hf_hub_download(name, FILE))
    except LocalEntryNotFoundError as error:
        raise PatchError(f"hub:{name}: the hub does not answer, and no {FILE} of it is in the cache") from error
    except FAULTS as error:
        raise PatchError(f"hub:{name}: {_words(error)}; expected a repository with {FILE}") from error


def upload(name: str, files: Mapping[str, bytes], private: bool) -> str:
    """Put files into a repository in one commit, made if it is not there; its address. Raises PatchError."""
    api = huggingface_hub.HfApi()
    added = [huggingface_hub.CommitOperationAdd(path, content) for path, content in files.items()]
    try:
        made = api.create_repo(repository(name), private=private, exist_ok=True)
        api.create_commit(name, added, commit_message="A patch by lmrepair")
    except FAULTS as error:
        advice = "is there a token that may write (hf auth login, HF_TOKEN)?"
        raise PatchError(f"hub:{name}: {_words(error)}; the patch was not pushed: {advice}") from error
    return str(made)


def _words(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
