"""What runs inside the sandbox: the candidate (a completion's program), the examiner (a task's tests), a command.

This file's own text is handed to an interpreter with ``-c``: the standard library alone, no import of the package.
Candidate and examiner are two processes with nothing in common but two pipes. The examiner holds the tests and
what they expect, and asks for calls; the candidate answers with plain values, packed as JSON. It never sees what is
expected, and its word is a value to be compared, not a verdict.
"""

from __future__ import annotations

import builtins
import json
import os
import resource
import sys
import types
from collections.abc import Callable
from typing import Any

LINE = 1 << 20  # bytes of one message
TEXT = 300  # characters of an exception's message
SMALL = 1 << 53


class DiedError(BaseException):
    """The candidate's process is gone, or says what is no message."""


class UnsendableError(BaseException):
    """The tests hand the candidate something that is no plain value."""


def confine(settings: dict[str, Any]) -> None:
    """Limits on this process and what it starts, then another user where one is named (root is under no limit)."""
    for name, value in settings["limits"].items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (most, most + (name == "RLIMIT_CPU" and most < value + 1 and hard != most)))
    user = settings.get("user")
    if user:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    sys.path += settings.get("path", [])


def pack(value: Any, keep: Callable[[Any], Any]) -> Any:
    """A plain value for JSON; subclasses lose what they override. Anything else is what ``keep`` makes of it."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        number = int.__index__(value)
        return number if -SMALL < number < SMALL else {"i": hex(number)}
    if isinstance(value, float):
        return {"f": float.__repr__(value)}
    if isinstance(value, complex):
        plain = complex.__add__(value, 0)
        return {"c": [repr(plain.real), repr(plain.imag)]}
    if isinstance(value, bytes):
        return {"b": bytes.hex(value)}
    kinds: tuple[tuple[Any, str], ...] = ((list, "l"), (tuple, "t"), (set, "s"), (frozenset, "z"))
    for kind, name in kinds:
        if isinstance(value, kind):
            return {name: [pack(item, keep) for item in kind.__iter__(value)]}
    if isinstance(value, dict):
        return {"d": [[pack(key, keep), pack(item, keep)] for key, item in dict.items(value)]}
    return keep(value)


def unpack(data: Any, kept: Callable[[int], Any]) -> Any:
    """The other way; ``kept`` gives what a number of ``keep`` stands for."""
    if not isinstance(data, dict):
        return data
    ((name, body),) = data.items()
    if name == "h":
        return kept(body)
    if name == "d":
        return {unpack(key, kept): unpack(item, kept) for key, item in body}
    if name == "c":
        return complex(float(body[0]), float(body[1]))
    if name == "i":
        return int(body, 16)
    if name in ("f", "b"):
        return float(body) if name == "f" else bytes.fromhex(body)
    kinds: dict[str, Any] = {"l": list, "t": tuple, "s": set, "z": frozenset}
    return kinds[name](unpack(item, kept) for item in body)


def private(count: int) -> list[int]:
    """The first standard streams as descriptors of our own; what runs here finds them empty."""
    mine = [os.dup(number) for number in range(count)]
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nowhere, number)
    return mine


def run(source: str, name: str, namespace: dict[str, Any]) -> None:
    """Run a module's source in a namespace."""
    types.FunctionType(compile(source, f"<{name}>", "exec"), namespace)()


def told(error: BaseException) -> dict[str, str]:
    """An exception as plain text, with the nearest builtin kind."""
    kinds = [kind.__name__ for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind]
    try:
        text = str(error)[:TEXT]
    except BaseException:  # noqa: BLE001  a completion's own __str__
        text = ""
    return {"raised": str(type(error).__name__)[:TEXT], "kind": kinds[0], "text": text}


class Candidate:
    """Loads the completion's program and answers calls of it, one line each."""

    def __init__(self) -> None:
        taken, given = private(2)
        self.taken, self.given = os.fdopen(taken, "rb"), os.fdopen(given, "wb")
        self.module = types.ModuleType("candidate")
        self.objects: list[Any] = []

    def serve(self) -> None:
        sys.modules["candidate"] = self.module
        source = json.loads(self.taken.readline())["source"]
        self.say(lambda _: run(source, "completion", self.module.__dict__), {})
        for line in iter(self.taken.readline, b""):
            self.say(self.answer, json.loads(line))

    def say(self, work: Callable[[dict[str, Any]], Any], asked: dict[str, Any]) -> None:
        try:
            text = json.dumps({"value": work(asked), "args": asked.get("now")})
        except BaseException as error:  # noqa: BLE001  whatever a completion raises, SystemExit too
            text = json.dumps(told(error))
        self.given.write(text.encode() + b"\n")
        self.given.flush()

    def keep(self, value: Any) -> dict[str, int]:
        self.objects.append(value)
        return {"h": len(self.objects) - 1}

    def answer(self, asked: dict[str, Any]) -> Any:
        target = asked["of"]
        if isinstance(target, str):
            if target not in self.module.__dict__:
                raise NameError(f"name {target!r} is not defined")
            held = self.module.__dict__[target]
        else:
            held = self.objects[target]
        args = [unpack(item, self.objects.__getitem__) for item in asked["args"]]
        named = {name: unpack(item, self.objects.__getitem__) for name, item in asked["named"].items()}
        what = {"call": held, "attr": lambda name: getattr(held, name), "item": lambda key: held[key]}
        what |= {"len": lambda: len(held), "list": lambda: list(held), "text": lambda: str(held)}
        found = pack(what[asked["do"]](*args, **named), self.keep)
        if any(isinstance(item, list | dict | set) for item in args):
            asked["now"] = [pack(item, self.keep) for item in args]
        return found


class Remote:
    """A function or object that lives in the candidate; only plain values come from it."""

    def __init__(self, examiner: Examiner, of: str | int) -> None:
        self.__dict__ |= {"_examiner": examiner, "_of": of}

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._examiner.ask(self._of, "call", args, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._examiner.ask(self._of, "attr", (name,))

    def __getitem__(self, key: Any) -> Any:
        return self._examiner.ask(self._of, "item", (key,))

    def __len__(self) -> int:
        return int(self._examiner.ask(self._of, "len"))

    def __iter__(self) -> Any:
        return iter(self._examiner.ask(self._of, "list"))

    def __str__(self) -> str:
        return str(self._examiner.ask(self._of, "text"))


class Examiner:
    """Runs a task's tests on a candidate next door and says what came of them, on what was standard error."""

    def __init__(self) -> None:
        taken, given, verdict = private(3)
        self.taken, self.given = os.fdopen(taken, "rb"), os.fdopen(given, "wb")
        self.verdict = os.fdopen(verdict, "wb")
        self.gone = False

    def serve(self) -> None:
        spec = json.loads(self.taken.readline())
        try:
            found = self.examine(spec)
        except DiedError:
            found = {"kind": "died"}
        except UnsendableError as error:
            found = {"kind": "unsupported", "text": str(error)}
        except BaseException as error:  # noqa: BLE001  whatever a test raises
            found = self.failed(error)
        if self.gone and found["kind"] != "unsupported":
            found = {"kind": "died"}
        self.verdict.write(json.dumps(found).encode() + b"\n")
        self.verdict.flush()

    def examine(self, spec: dict[str, Any]) -> dict[str, Any]:
        self.heard()
        namespace: dict[str, Any] = {"__name__": "tests", "completion": spec["completion"]}
        for name in ("imports", "helpers"):
            run(spec[name], name, namespace)
        for name, inside in spec["names"].items():
            namespace[name] = Remote(self, inside)
        run(spec["tests"], "tests", namespace)
        if spec["entry"] and callable(namespace.get("check")):
            namespace["check"](Remote(self, spec["entry"]))
        return {"kind": "passed"}

    def failed(self, error: BaseException) -> dict[str, Any]:
        said = told(error)
        if getattr(error, "of_candidate", False):
            return {"kind": "raised", "type": said["raised"], "text": said["text"]}
        line, at = 0, error.__traceback__
        while at is not None:
            if at.tb_frame.f_code.co_filename == "<tests>":
                line = at.tb_lineno
            at = at.tb_next
        if isinstance(error, AssertionError):
            return {"kind": "wrong", "line": line, "text": said["text"]}
        return {"kind": "wrong", "line": line, "text": f"{said['raised']}: {said['text']}"}

    def ask(self, of: str | int, do: str, args: tuple[Any, ...] = (), named: dict[str, Any] | None = None) -> Any:
        packed = [pack(item, self.hand_over) for item in args]
        others = {name: pack(item, self.hand_over) for name, item in (named or {}).items()}
        try:
            self.given.write(json.dumps({"of": of, "do": do, "args": packed, "named": others}).encode() + b"\n")
            self.given.flush()
        except OSError as error:
            self.gone = True
            raise DiedError from error
        heard = self.heard()
        for item, now in zip(args, heard.get("args") or (), strict=False):
            refresh(item, unpack(now, self.object))
        return unpack(heard.get("value"), self.object)

    def heard(self) -> dict[str, Any]:
        line = self.taken.readline(LINE)
        try:
            found = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            self.gone = True
            raise DiedError
        if "raised" in found:
            kind = getattr(builtins, str(found.get("kind")), Exception)
            if not (isinstance(kind, type) and issubclass(kind, BaseException)):
                kind = Exception
            plain = kind if not issubclass(kind, UnicodeError) else ValueError
            raise type(str(found["raised"]), (plain,), {"of_candidate": True})(str(found.get("text")))
        return found

    def object(self, number: int) -> Remote:
        return Remote(self, number)

    def hand_over(self, value: Any) -> dict[str, Any]:
        if isinstance(value, Remote) and isinstance(value._of, int):
            return {"h": value._of}
        raise UnsendableError(f"the tests hand over {type(value).__name__}, which is no plain value")


def refresh(item: Any, now: Any) -> None:
    """What a call did to an argument, done to the examiner's own."""
    if isinstance(item, list) and isinstance(now, list) and item != now:
        item[:] = now
    elif isinstance(item, dict | set) and isinstance(now, type(item)) and item != now:
        item.clear()
        item.update(now)


def command(words: list[str]) -> None:
    """Put standard input into a file, and become a command with that file as its standard input."""
    path = os.path.abspath("completion.py")
    with open(path, "wb") as file:
        for block in iter(lambda: os.read(0, 1 << 16), b""):
            file.write(block)
    os.dup2(os.open(path, os.O_RDONLY), 0)
    os.execv("/bin/sh", ["sh", "-c", *[word.replace("{file}", path) for word in words]])


def main(role: str, settings: str, *words: str) -> None:
    """Take on the limits, then the role."""
    confine(json.loads(settings))
    if role == "candidate":
        Candidate().serve()
    elif role == "examiner":
        Examiner().serve()
    elif role == "command":
        command(list(words))
    else:
        os.write(1, b"here")


if __name__ == "__main__":
    main(*sys.argv[1:])
