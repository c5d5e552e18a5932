"""What a measurement ran on: versions, processor, device, and how much memory it took. No names, no places."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("lmrepair", "torch", "transformers", "safetensors", "peft", "sacrebleu", "rouge-score", "rapidfuzz")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def versions() -> dict[str, str]:
    """The versions of what figures depend on; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """The kind of machine: system, processor, threads, and the device's name."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


class Peak:
    """The most memory in use since ``start`` above what was in use then, in bytes.

    On a GPU what torch allocated, else the process's resident memory as Linux counts it. None where the
    system does not let its peak be reset.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._base: int | None = None

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._base = torch.cuda.memory_allocated(self.device)
            return
        try:
            _CLEAR.write_text("5", encoding="ascii")
            self._base = _status("VmRSS")
        except OSError:
            self._base = None

    def read(self) -> int | None:
        if self._base is None:
            return None
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _status("VmHWM")
        return max(0, peak - self._base)


def _status(key: str) -> int:
    """A line of /proc/self/status, in bytes. Raises OSError where there is none."""
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in {_STATUS}")
