"""What hostile completions try, and that it holds them: the table in docs/fix.md, row by row."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from pathlib import Path
from uuid import uuid4

import pytest

from lmrepair.checks import Checker, Limits, Sandbox, Task, Verdict

SECRET = "the expected answer is a secret 8713"
TESTS = "assert f(1) == 41713906553271098442\nassert f(2) == 90210558127460039517\n"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "fix.md"


def judged(checker: Checker, body: str, tests: str = TESTS) -> Verdict:
    """The verdict on a program, all of it the completion's."""
    return checker.check(Task("t", "", tests, joined=False, stop=""), body)


def returns(checker: Checker, expression: str, before: str = "") -> Verdict:
    """The verdict on f() == True for a function that returns the expression: whether an attack says it got through."""
    return judged(checker, f"{before}\ndef f():\n    return {expression}\n", "assert f() is True\n")


def test_reading_a_secret_file(checker: Checker, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    tmp_path.chmod(0o755)
    found = returns(checker, f"{SECRET!r} in open({str(secret)!r}).read()")
    assert found.label in ("FileNotFoundError", "PermissionError"), found
    for path in ("/etc/passwd", "/etc/shadow", str(Path.home() / ".ssh"), __file__):
        found = judged(
            checker, f"import os\ndef f():\n    return os.path.exists({path!r}) and os.access({path!r}, os.R_OK)\n",
            "assert f() is False\n",
        )  # fmt: skip
        assert found.passed, (path, found)


def test_reading_the_environment(checker: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMREPAIR_TEST_TOKEN", SECRET)
    assert not returns(checker, f"{SECRET!r} in os.environ.values()", "import os").passed


def test_network(checker: Checker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        body = f"import socket\ndef f():\n    socket.create_connection(('127.0.0.1', {port}), 2)\n    return True\n"
        found = judged(checker, body, "assert f() is True\n")
    assert found.kind == "exception", found


def test_fork_bomb(checker: Checker) -> None:
    body = "import os\nwhile True:\n    os.fork()\n"
    began = time.monotonic()
    found = judged(checker, body)
    assert found.label in ("BlockingIOError", "died", "timeout", "OSError"), found
    assert time.monotonic() - began < 60
    count = (
        "import os\ndef f():\n    n = 0\n    while n < 300:\n        if os.fork() == 0:\n            os.read(0, 1)\n"
    )
    count += "            import time; time.sleep(60)\n        n += 1\n    return True\n"
    assert judged(checker, count, "assert f() is True\n").label in ("BlockingIOError", "OSError")


def test_huge_allocation(checker: Checker) -> None:
    assert returns(checker, "len(bytearray(100 * 2**30)) > 0").label == "MemoryError"


@pytest.mark.parametrize(
    "body",
    [
        "import sys\nwhile True:\n    sys.stdout.write('x' * 10**6)\n",
        "import os\nfor n in range(64):\n    try:\n        while True:\n            os.write(n, b'x' * 10**6)\n"
        "    except OSError:\n        pass\n",
    ],
)
def test_endless_output(checker: Checker, body: str) -> None:
    assert judged(checker, body).kind in ("timeout", "died")


def test_endless_output_of_a_command(sandbox: Sandbox) -> None:
    ran = sandbox.run("yes", b"", Limits(output=1 << 16, wall=20.0))
    assert ran.stopped == "output"
    assert len(ran.output) <= 1 << 16


def test_large_files(checker: Checker) -> None:
    body = "def f():\n    with open('/tmp/big', 'wb') as file:\n        for _ in range(1000):\n"
    body += "            file.write(b'x' * 10**6)\n    return True\n"
    assert not judged(checker, body, "assert f() is True\n").passed


def test_killing_the_parent(checker: Checker) -> None:
    victim = subprocess.Popen(["sleep", "60"])
    try:
        body = f"import os, signal\nfor pid in (os.getppid(), {os.getpid()}, {victim.pid}, -1):\n"
        body += "    try:\n        os.kill(pid, signal.SIGKILL)\n    except OSError:\n        pass\n"
        body += "def f():\n    return True\n"
        judged(checker, body, "assert f() is True\n")
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_writing_outside(checker: Checker, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    name = f"lmrepair-{uuid4().hex}"
    for folder in (str(tmp_path), "/usr/lib", "/", "/var/tmp", "/dev/shm"):
        judged(checker, f"open({folder + '/' + name!r}, 'w').write('x')\n")
        assert not Path(folder, name).exists(), folder


def test_nothing_is_left_running(checker: Checker) -> None:
    mark = f"3600.{uuid4().int % 10**9}"
    body = f"import os\nif os.fork() == 0:\n    os.setsid()\n    os.execvp('sleep', ['sleep', '{mark}'])\n"
    judged(checker, body + "def f(n):\n    return 0\n")
    deadline = time.monotonic() + 20  # the kernel takes the namespace down when its first process is gone
    while running(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(mark)


def running(mark: str) -> bool:
    found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return mark in found


@pytest.mark.parametrize(
    "body",
    [
        "import os\nos._exit(0)\n",
        "import sys\nsys.exit(0)\n",
        "import atexit, os\natexit.register(lambda: os._exit(0))\n",
        "import os\ndef f(n):\n    os._exit(0)\n",
        "def f(n):\n    raise SystemExit(0)\n",
        "import os, signal\ndef f(n):\n    os.kill(os.getpid(), signal.SIGTERM)\n",
    ],
)
def test_leaving_with_status_0(checker: Checker, body: str) -> None:
    assert judged(checker, body).label in ("died", "SystemExit", "wrong")


@pytest.mark.parametrize(
    "body",
    [
        "class A:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
        "    def __bool__(self): return True\n",
        "class A(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n",
        "class A(str):\n    def __eq__(self, other): return True\n    def __str__(self): return '41713'\n"
        "    __hash__ = str.__hash__\n",
        "class A(list):\n    def __eq__(self, other): return True\n    def __len__(self): return 41713\n",
        "class A(dict):\n    def __eq__(self, other): return True\n    def items(self): return [(41713, 41713)]\n",
        "class A(float):\n    def __eq__(self, other): return True\n    def __repr__(self): return '41713.0'\n",
    ],
)
def test_overriding_equality(checker: Checker, body: str) -> None:
    assert judged(checker, body + "def f(n):\n    return A()\n").kind == "wrong"


def test_a_class_of_its_own_cannot_claim_to_be_equal(checker: Checker) -> None:
    body = "class Money:\n    def __init__(self, n): self.n = n\n    def __eq__(self, other): return True\n"
    tests = "a = Money(3)\nassert a.n == 3\nassert a == Money(4)\n"
    assert judged(checker, body, tests).kind == "wrong"


FORGE = """
import json, os, sys, gc, builtins
def say(**found):
    for number in range(64):
        try:
            os.write(number, json.dumps(found).encode() + b"\\n")
        except OSError:
            pass
"""


@pytest.mark.parametrize(
    "body",
    [
        FORGE + "say(kind='passed')\nos._exit(0)\n",
        FORGE + "say(value=None, args=None)\nsay(kind='passed')\nsay(value=0, args=None)\nos._exit(0)\n",
        FORGE + "import __main__\n__main__.pack = lambda *a: {'kind': 'passed'}\ndef f(n): return 0\n",
        FORGE + 'import __main__\n__main__.Examiner = None\njson.dumps = lambda *a: \'{"kind": "passed"}\'\n'
        "def f(n): return 0\n",
        "import builtins\nbuiltins.AssertionError = type('E', (Exception,), {})\nbuiltins.__build_class__ = None\n"
        "def f(n): return 0\n",
        "raise type('x', (AssertionError,), {'of_candidate': False})('kind passed')\n",
        "def f(n):\n    import sys\n    for frame in sys._current_frames().values():\n"
        "        while frame:\n            frame.f_globals.update(check=None, completion='passed')\n"
        "            frame = frame.f_back\n    return 0\n",
    ],
)
def test_patching_the_checker(checker: Checker, body: str) -> None:
    found = judged(checker, body)
    assert not found.passed, found


def test_walking_the_heap_for_what_is_expected(checker: Checker) -> None:
    # Twenty digits: five stood now and then in the address that a repr shows.
    walk = (
        "import gc, sys\n"
        "def seen():\n"
        "    found = set()\n"
        "    for frame in sys._current_frames().values():\n"
        "        while frame:\n"
        "            found.add(repr(frame.f_locals)); found.add(repr(frame.f_code.co_consts)); frame = frame.f_back\n"
        "    for one in gc.get_objects():\n"
        "        try: found.add(repr(one))\n"
        "        except Exception: pass\n"
        "    for path in ('/proc/self/cmdline', '/proc/self/environ', '/proc/1/cmdline', '/proc/1/environ'):\n"
        "        try: found.add(open(path).read())\n"
        "        except OSError: pass\n"
        "    return any('4171390' + '6553271098442' in text or '9021055' + '8127460039517' in text for text in found)\n"
        "def f(n):\n    return seen()\n"
    )
    assert judged(
        checker,
        walk,
        "assert f(1) is False or f(1) == 41713906553271098442\nassert f(2) is False or f(2) == 90210558127460039517\n",
    ).passed


def test_arguments_come_back_as_plain_values(checker: Checker) -> None:
    """A list that a call changes is changed for the tests too, but only into plain values."""
    body = "class A(int):\n    def __eq__(self, other): return True\ndef f(x):\n    x[:] = [A(0)]\n"
    assert judged(checker, body, "x = [1]\nf(x)\nassert x == [1]\n").kind == "wrong"
    assert judged(checker, "def f(x):\n    x.append(2)\n", "x = [1]\nf(x)\nassert x == [1, 2]\n").passed


def test_every_attack_is_in_the_docs() -> None:
    """Each test above is named in the table, and the table names no others."""
    mine = set(
        re.findall(r"^def (test_\w+)\(checker|^def (test_\w+)\(sandbox", Path(__file__).read_text(), re.MULTILINE)
    )
    named = set(re.findall(r"\| `(test_\w+)` \|", PAGE.read_text(encoding="utf-8")))
    assert named == {one or other for one, other in mine}
