"""Tasks in: prompts with the tests that decide on a completion, in the forms that the field writes them in."""

from __future__ import annotations

import ast
import gzip
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmrepair.errors import FailuresError
from lmrepair.failures import Failure, read_lines

AFTER_BODY = r"\n+(?=[^\s])"  # a line that is not indented ends the body of a function
AFTER_PROGRAM = r'\n+(?=assert |print\(|if __name__|"""|```|#|\[DONE\])'
FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
FORMS = (
    "HumanEval (task_id, prompt, test, entry_point), MBPP (text or prompt, test_list, code), "
    "or prompt (or messages) with check"
)
SHELL = "$ "  # what a check begins with that is a command


@dataclass(frozen=True)
class Task:
    """A prompt with what decides on its completion.

    ``tests``: Python source; it finds the program's functions by name, and the completion's text as
    ``completion``. If it defines ``check`` it is called with ``entry_point``. ``shell``: a command instead, which
    gets the completion on standard input and as ``{file}``; exit status 0 passes. ``stop``: a regular expression,
    the completion ends before its first match. ``joined``: the program is prompt and completion, not the latter
    alone. ``calls``: name in the tests → name in the program, where they differ. ``canonical``: a completion that
    is right; empty if there is none. ``lead``: the line breaks that ended the prompt as it was given; a completion
    begins with them.
    """

    id: str
    prompt: str
    tests: str
    entry_point: str = ""
    canonical: str = ""
    stop: str = AFTER_BODY
    joined: bool = True
    shell: str = ""
    imports: str = ""
    messages: tuple[Mapping[str, str], ...] = ()
    calls: tuple[tuple[str, str], ...] = ()
    lead: str = ""

    def failure(self, target: str) -> Failure:
        """The task as a failure that wants ``target``."""
        return Failure(self.prompt, target, self.id, (), self.messages, end_turn=False)

    def cut(self, text: str) -> str:
        """The completion up to where it ends by the task's stop rule."""
        return text[: self.end(text)]

    def end(self, text: str) -> int:
        """Where the completion in ``text`` ends: before the stop rule's first match, or with the text."""
        if not self.stop:
            return len(text)
        # An unindented first line ends a body at once; by any other rule the prompt's own line breaks end nothing.
        begun = self.stop != AFTER_BODY and text.startswith(self.lead)
        found = re.compile(self.stop).search(text, len(self.lead) if begun else 0)
        return found.start() if found else len(text)

    def program(self, completion: str) -> str:
        """The Python source that the completion makes of the task."""
        body = self.prompt + completion if self.joined and not self.messages else self.code(completion)
        return f"{self.imports}\n{body}\n" if self.imports else f"{body}\n"

    def code(self, completion: str) -> str:
        """The code in a completion: of a chat's answer what stands in its first fence, else what follows ``lead``."""
        found = FENCE.search(completion) if self.messages else None
        return found.group(1) if found else completion.removeprefix(self.lead)

    def helpers(self) -> str:
        """What the prompt defines above what it leaves open, for the tests to use; empty where it is not Python."""
        return self._parts()[0]

    def opened(self) -> str:
        """The name of the function or class that the prompt leaves open; empty if there is none."""
        return self._parts()[1]

    def _parts(self) -> tuple[str, str]:
        if not self.joined or self.messages:
            return "", ""
        for source in (self.prompt.rstrip("\n") + "\n    pass\n", self.prompt):
            try:
                body = ast.parse(source).body
            except (SyntaxError, ValueError):
                continue
            last = body[-1] if body and isinstance(body[-1], ast.FunctionDef | ast.ClassDef) else None
            if last is None:
                return source, ""
            first = min([last.lineno, *(one.lineno for one in last.decorator_list)])
            return "".join(source.splitlines(keepends=True)[: first - 1]), last.name
        return "", ""


def read_tasks(path: str | Path, limit: int | None = None) -> list[Task]:
    """Read JSON lines (also gzipped) in one of the FORMS, recognised by their keys.

    Raises FailuresError, with the line, for rows in none of them, broken tests, or an id used twice.
    """
    found: list[Task] = []
    seen: set[str] = set()
    for number, row in _rows(Path(path)):
        if limit is not None and len(found) >= limit:
            break
        where = f"{path}, line {number}"
        task = read_task(row, number, where)
        if task.id in seen:
            raise FailuresError(f"{where}: id {task.id!r} is used before; ids are unique")
        seen.add(task.id)
        found.append(task)
    if not found:
        raise FailuresError(f"{path}: no tasks in it; expected JSON lines as {FORMS}")
    return found


def read_task(row: Mapping[str, Any], number: int, where: str) -> Task:
    """One row; ``where`` is named in the FailuresError that says what is wrong with it."""
    texts = ("prompt", "test", "entry_point", "canonical_solution", "text", "code", "check", "imports", "stop")
    for key in texts:
        if key in row and not isinstance(row[key], str):
            raise FailuresError(f"{where}: {key} is no text; expected text")
    identity = str(row.get("task_id", row.get("id", number)))
    if "test" in row and "entry_point" in row and "prompt" in row:
        task = _human_eval(row, identity)
    elif "test_list" in row and ("text" in row or "prompt" in row):
        task = _mbpp(row, identity, where)
    elif "check" in row and ("prompt" in row) != ("messages" in row):
        task = _own(row, identity, where)
    else:
        raise FailuresError(f"{where}: found keys {', '.join(sorted(map(str, row))) or 'none'}; expected {FORMS}")
    for name, source in (("tests", task.tests), ("imports", task.imports)):
        try:
            ast.parse(source)
        except (SyntaxError, ValueError) as error:
            raise FailuresError(f"{where}: the {name} are not Python ({error}); correct them") from error
    try:
        re.compile(task.stop)
    except re.error as error:
        raise FailuresError(f"{where}: stop is no regular expression ({error}); correct it") from error
    return task


def _human_eval(row: Mapping[str, Any], identity: str) -> Task:
    entry, (prompt, lead) = row["entry_point"], _broken(row["prompt"])
    canonical = _indented(row, lead)
    return Task(identity, prompt, row["test"], entry, canonical, calls=((entry, entry),), lead=lead)


def _broken(prompt: str) -> tuple[str, str]:
    """A prompt without the line breaks that end it, and these: tokenizers join them with the indent that follows.

    Behind a bare line break a model is asked for what it never saw begin there (``docs/fix.md``).
    """
    bare = prompt.rstrip("\n")
    return (bare, prompt[len(bare) :]) if bare else (prompt, "")


def _mbpp(row: Mapping[str, Any], identity: str, where: str) -> Task:
    tests = row["test_list"]
    given = row.get("test_imports", []) + [row.get("test_setup_code", "")] + tests if isinstance(tests, list) else []
    if not given or not all(isinstance(line, str) for line in given):
        raise FailuresError(f"{where}: test_list is no list of texts; expected assert statements")
    prompt = f'"""\n{row.get("text", row.get("prompt"))}\n{tests[0]}\n"""\n'
    return Task(identity, prompt, "\n".join(given), "", row.get("code", ""), AFTER_PROGRAM, False)


def _own(row: Mapping[str, Any], identity: str, where: str) -> Task:
    check, messages, prompt = row["check"], row.get("messages"), row.get("prompt", "")
    if messages is not None:
        fits = isinstance(messages, list) and all(
            isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
            for one in messages
        )
        if not fits or not messages:
            raise FailuresError(f"{where}: messages is not a list of {{role, content}} objects with texts")
    shell = check.removeprefix(SHELL) if check.startswith(SHELL) else ""
    opened = not messages and _opens_body(prompt)
    prompt, lead = _broken(prompt)
    return Task(
        identity,
        prompt,
        "" if shell else check,
        row.get("entry_point", ""),
        _indented(row, lead),
        row.get("stop", AFTER_BODY if opened else "" if messages else AFTER_PROGRAM),
        not messages,
        shell,
        row.get("imports", ""),
        tuple(messages or ()),
        lead=lead,
    )


def _opens_body(prompt: str) -> bool:
    """Whether a function begins at a prompt's end, after its head or its docstring."""
    return prompt.rstrip().endswith((":", '"""', "'''"))


def _indented(row: Mapping[str, Any], lead: str) -> str:
    """The canonical solution as the prompt goes on: its first line indented where the prompt opens a body."""
    text = str(row.get("canonical_solution", ""))
    if (
        _opens_body(str(row.get("prompt", "")))
        and not text[:1].isspace()
        and not text.startswith(("def ", "import ", "from "))
    ):
        text = "".join(f"    {line}" if line.strip() else line for line in text.splitlines(keepends=True))
    return lead + text if text else ""


def _rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    if path.suffix != ".gz":
        yield from read_lines(path)
        return
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise FailuresError(f"{path}: cannot be read as gzipped UTF-8 text ({error})") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise FailuresError(f"{path}, line {number}: broken JSON ({error.msg})") from error
            if not isinstance(row, dict):
                raise FailuresError(f"{path}, line {number}: expected an object with {FORMS}")
            yield number, row
