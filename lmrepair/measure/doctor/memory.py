"""How much memory can still be had, where a model is or is to be. Imports torch only for a model on a GPU."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmrepair.model import Net


def free() -> int | None:
    """Bytes that this process can still have: by the machine, its group's limit, its own; None: nobody says."""
    found = []
    with suppress(OSError, LookupError, ValueError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        most, used = ((group / f"memory.{name}").read_text(encoding="ascii") for name in ("max", "current"))
        found.append(int(most) - int(used))
    with suppress(ImportError, OSError, LookupError, ValueError):
        import resource

        most_mapped = resource.getrlimit(resource.RLIMIT_AS)[0]
        mapped = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        if most_mapped != resource.RLIM_INFINITY:
            found.append(most_mapped - mapped)
    return max(0, min(found)) if found else None


def free_for(net: Net) -> int | None:
    """The same where the net is."""
    if net.device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(net.device)[0])
    return free()
