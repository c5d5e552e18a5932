"""Completions held against their tasks' tests, next door to each other in two sandboxes."""

from __future__ import annotations

import ast
import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lmrepair.checks.sandbox import Limits, Sandbox, end, read_until
from lmrepair.checks.syntax import Forbidden, forbidden
from lmrepair.checks.tasks import Task
from lmrepair.errors import FailuresError, UsageError

PIPE = 1 << 20  # bytes that wait in a pipe: a program or a task's tests, before anyone reads them
NOT_RUN = (126, 127)  # exit statuses of a shell that could not run a command
TOO_LONG = {128 + signal.SIGXCPU, 128 + signal.SIGKILL, -signal.SIGXCPU, -signal.SIGKILL}


@dataclass(frozen=True)
class Verdict:
    """What became of a completion. ``kind``: passed, wrong (a test failed on what it returned), syntax, timeout,
    died (its process ended, or said what is no answer), exception (``detail`` begins with its type), unsupported
    (the tests hand over what is no plain value), forbidden, lint, command.
    """

    kind: str
    detail: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.kind == "passed"

    @property
    def label(self) -> str:
        """The kind; of exceptions the type."""
        return self.detail.partition(":")[0] if self.kind == "exception" else self.kind

    def data(self) -> dict[str, Any]:
        return {"kind": self.kind, "detail": self.detail, "seconds": round(self.seconds, 4)}


@dataclass(frozen=True)
class Checker:
    """How completions are judged: the sandbox, its limits, and what holds for every task beside its tests.

    ``lint``: shell commands that get the program on standard input (and as ``{file}``); exit status 0 is content.
    ``jobs``: how many at a time.
    """

    sandbox: Sandbox
    limits: Limits = field(default_factory=Limits)
    forbid: tuple[Forbidden, ...] = ()
    lint: tuple[str, ...] = ()
    jobs: int = 1

    def check_all(
        self, pairs: Sequence[tuple[Task, str]], report: Callable[[int, int], None] | None = None
    ) -> list[Verdict]:
        """The verdicts on tasks' completions, in order."""
        found: list[Verdict] = []
        with ThreadPoolExecutor(self.jobs) as pool:
            for verdict in pool.map(lambda pair: self.check(*pair), pairs):
                found.append(verdict)
                if report is not None:
                    report(len(found), len(pairs))
        return found

    def check(self, task: Task, completion: str) -> Verdict:
        """The verdict on one completion, which is cut by the task's stop rule already."""
        began = time.perf_counter()
        verdict = self._rules(task, completion)
        if verdict is None:
            verdict = self._shell(task, completion) if task.shell else self._tests(task, completion)
        return Verdict(verdict.kind, verdict.detail, time.perf_counter() - began)

    def _rules(self, task: Task, completion: str) -> Verdict | None:
        program = task.program(completion)
        if not task.shell or self.forbid:
            try:
                tree = ast.parse(program)
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                return Verdict("syntax", f"{type(error).__name__}: {error}")
            found = forbidden(tree, self.forbid)
            if found:
                return Verdict("forbidden", found)
        for command in self.lint:
            verdict = self._command("lint", command, program)
            if not verdict.passed:
                return verdict
        return None

    def _shell(self, task: Task, completion: str) -> Verdict:
        return self._command("command", task.shell, task.code(completion))

    def _command(self, kind: str, shell: str, text: str) -> Verdict:
        ran = self.sandbox.run(shell, text.encode("utf-8", "replace"), self.limits)
        if ran.stopped == "time":
            return Verdict("timeout", shell)
        if ran.status or ran.stopped:
            said = ran.output.decode(errors="replace").strip()[:300]
            if kind == "lint" and ran.status in NOT_RUN:
                raise UsageError(f"--lint {shell!r} does not run here ({said or f'exit status {ran.status}'})")
            return Verdict(kind, f"{shell}: exit status {ran.status}" + (f": {said}" if said else ""))
        return Verdict("passed")

    def _tests(self, task: Task, completion: str) -> Verdict:
        spec = {
            "imports": task.imports,
            "helpers": task.helpers(),
            "tests": task.tests,
            "entry": task.entry_point,
            "names": called(task, completion),
            "completion": completion.removeprefix(task.lead),
        }
        verdict, status = self._exchange({"source": task.program(completion)}, spec)
        if verdict is None:
            return Verdict("timeout", f"{self.limits.wall:g} s")
        kind, text = str(verdict.get("kind")), str(verdict.get("text", ""))
        if kind == "died" and status in TOO_LONG:
            return Verdict("timeout", f"{self.limits.cpu} s of processor time, or killed")
        if kind == "raised":
            return Verdict("exception", f"{verdict.get('type')}: {text}")
        if kind == "wrong":
            said = f" ({text})" if text else ""
            return Verdict("wrong", f"line {verdict.get('line')}: {source_line(task.tests, verdict.get('line'))}{said}")
        return Verdict(kind, f"exit status {status}" if kind == "died" else text)

    def _exchange(self, program: Mapping[str, Any], spec: Mapping[str, Any]) -> tuple[dict[str, Any] | None, int]:
        """What the examiner says, None where it says nothing in time, and the candidate's exit status."""
        deadline = time.perf_counter() + self.limits.wall
        to_candidate, asks = _pipe(program)
        to_examiner, answers = _pipe(spec)
        none = subprocess.DEVNULL
        with TemporaryDirectory() as one, TemporaryDirectory() as other:
            with to_candidate, answers:
                candidate = self.sandbox.start("candidate", [], self.limits, (to_candidate, answers, none), Path(one))
            with to_examiner, asks:
                streams = (to_examiner, asks, subprocess.PIPE)
                examiner = self.sandbox.start("examiner", [], self.limits, streams, Path(other))
            try:
                said, _ = read_until(examiner, deadline, self.limits.output)
            finally:
                end(examiner)
                end(candidate, 1.0)
                if examiner.stderr is not None:
                    examiner.stderr.close()
        lines = said.decode(errors="replace").strip().splitlines()
        try:
            found = json.loads(lines[-1]) if lines else None
        except json.JSONDecodeError:
            found = {"kind": "died", "text": lines[-1]}
        return found if isinstance(found, dict) else None, candidate.returncode


def _pipe(first: Mapping[str, Any]) -> tuple[Any, Any]:
    """The two ends of a pipe in which a first message waits."""
    line = json.dumps(first).encode() + b"\n"
    out, into = os.pipe()
    size = fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, PIPE)
    if len(line) > size:
        os.close(out)
        os.close(into)
        raise FailuresError(f"a task's program or tests take {len(line):,} bytes; expected at most {size:,}")
    os.write(into, line)
    return os.fdopen(out, "rb"), os.fdopen(into, "wb")


def called(task: Task, completion: str) -> dict[str, str]:
    """Names in the tests → names of the program that they stand for: what it defines and the tests do not."""
    names = dict(task.calls)
    helpers = _defined(task.helpers()) - {task.entry_point}
    mine = _defined(task.program(completion)) - helpers - _defined(task.tests)
    if task.entry_point and task.entry_point not in names.values():
        names[task.entry_point] = task.entry_point
    used = {node.id for node in ast.walk(ast.parse(task.tests)) if isinstance(node, ast.Name)}
    renamed = set(names.values())
    return names | {name: name for name in sorted(mine & used - renamed)}


def _defined(source: str) -> set[str]:
    found: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def source_line(source: str, number: Any) -> str:
    """A line of a source by its number from 1; empty if there is none."""
    lines = source.splitlines()
    return lines[number - 1].strip()[:200] if isinstance(number, int) and 0 < number <= len(lines) else ""


def kinds(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How many of each label, the most frequent first."""
    labels = [verdict.label for verdict in verdicts]
    return dict(sorted(((label, labels.count(label)) for label in set(labels)), key=lambda item: (-item[1], item[0])))
