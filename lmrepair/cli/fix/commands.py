"""The commands that execute: ``check`` says which tests pass, ``fix`` repairs until they do."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from lmrepair.checks import Checker, Forbidden, Limits, Task, read_tasks, strongest
from lmrepair.cli.fix.outcomes import check_data, check_text, fix_data, fix_text
from lmrepair.cli.options import (
    GateOptions,
    Json,
    Limit,
    Model,
    Named,
    SeededLoadOptions,
    Text,
    chosen_gate,
    chosen_method,
    refuse_unwritable,
)
from lmrepair.cli.output import progress_bars, show_result
from lmrepair.cli.starting import load_net
from lmrepair.errors import UsageError
from lmrepair.methods import DEFAULT

_RUN = "Execution"
_AIM = "The answer aimed at"
Tasks = Annotated[Path, typer.Argument(metavar="TASKS", help="HumanEval, MBPP, or prompt with check (docs/fix.md).")]
Canonical = Annotated[bool, typer.Option("--canonical", help="Given solutions instead of the model's own samples.")]
Answers = Annotated[
    Path | None, typer.Option(metavar="FIX.json", help="Aim at what an earlier fix --json aimed at; no sampling.")
]
Completions = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Check these (task_id, completion) instead of a model's.")
]
Jobs = Annotated[int, typer.Option(min=1, help="Completions executed at a time.", rich_help_panel=_RUN)]
Unsafe = Annotated[
    bool,
    typer.Option("--unsafe", help="Run completions without a sandbox, with all your rights.", rich_help_panel=_RUN),
]
Forbid = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Code that must not occur, as in 'yaml.load(...)'.", rich_help_panel=_RUN),
]
Lint = Annotated[
    list[str] | None,
    typer.Option(metavar="CMD", help="A command that must be content, as in 'ruff check -'.", rich_help_panel=_RUN),
]
Cpu = Annotated[int, typer.Option("--cpu", min=1, help="Processor seconds of a test.", rich_help_panel=_RUN)]
Wall = Annotated[float, typer.Option("--wall", min=0.1, help="Wall seconds of a test.", rich_help_panel=_RUN)]
Memory = Annotated[int, typer.Option("--memory-mb", min=64, help="Megabytes of a process.", rich_help_panel=_RUN)]
Length = Annotated[int, typer.Option(min=1, help="Most tokens of a completion.")]
Samples = Annotated[int, typer.Option(min=0, help="Most samples of a task.", rich_help_panel=_AIM)]
Seconds = Annotated[float, typer.Option(min=1, help="Most seconds of sampling a task.", rich_help_panel=_AIM)]
Heat = Annotated[str, typer.Option(metavar="T,T,…", help="The temperatures, in turn.", rich_help_panel=_AIM)]
Group = Annotated[Path | None, typer.Option(metavar="FILE", help="Tasks measured before and after, not repaired.")]
Reworded = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The same tasks (by task_id) in other words, measured like those.")
]
Patched = Annotated[Path | None, typer.Option("--output", help="The patch file.")]
MaxKl = Annotated[float | None, typer.Option("--max-kl", help="The gate: most KL on reference text, nats per token.")]
Protect = Annotated[Path | None, typer.Option("--protect", help="Prompts that must come out as before (docs/gate.md).")]
Earlier = Annotated[list[Path] | None, typer.Option("--memory", help="An earlier patch that must still hold.")]


@dataclass(frozen=True)
class JudgeOptions:
    """How completions are executed and judged."""

    forbid: Forbid = None
    lint: Lint = None
    jobs: Jobs = 1
    cpu: Cpu = 5
    wall: Wall = 20.0
    memory_mb: Memory = 1024
    unsafe: Unsafe = False


@dataclass(frozen=True)
class FixGateOptions(GateOptions):
    """The gate of ``fix``, in few words."""

    max_kl: MaxKl = None
    protect: Protect = None
    drift: str = "quick"
    memory: Earlier = None


def check(
    tasks: Tasks,
    *,
    model: Model = None,
    completions: Completions = None,
    length: Length = 256,
    limit: Limit = None,
    judging: JudgeOptions,
    loading: SeededLoadOptions,
    as_json: Json = False,
) -> None:
    """Execute a model's greedy completions against their tests: pass@1 with its interval, outcomes by kind."""
    rows = read_tasks(tasks, limit)
    checker = chosen_checker(judging)
    name, texts = "", [""] * len(rows)
    with progress_bars() as progress:
        if completions is not None:
            texts = _given(completions, rows)
            found = checker.check_all(list(zip(rows, texts, strict=True)), lambda a, b: progress("execute", a, b))
        else:
            from lmrepair.checks import runs

            net = load_net(model, loading)
            name, done = net.name, runs(net, rows, checker, length, progress)
            found, texts = [run.verdict for run in done], [run.written.completion for run in done]
    data = check_data(name, checker.sandbox.kind, rows, texts, found)
    show_result(data, check_text(data), as_json)
    raise typer.Exit(0 if data["passing"] == data["tasks"] else 1)


def fix(
    tasks: Tasks,
    *,
    model: Model = None,
    output: Patched = None,
    held_out: Group = None,
    wordings: Reworded = None,
    method: Named = DEFAULT,
    canonical: Canonical = False,
    answers: Answers = None,
    samples: Samples = 32,
    seconds: Seconds = 120.0,
    temperatures: Heat = "0.3,0.6,0.9,1.2",
    length: Length = 128,
    gating: FixGateOptions,
    reference: Text = None,
    limit: Limit = None,
    judging: JudgeOptions,
    loading: SeededLoadOptions,
    as_json: Json = False,
) -> None:
    """Repair what fails its tests: the model's own sample that passes is the target, what passed is protected."""
    chosen = chosen_method(method, None, loading.seed, {})
    target = output or Path(f"{tasks.name.partition('.')[0]}.patch.safetensors")
    refuse_unwritable(target, False)
    heat = _temperatures(temperatures)
    rows = read_tasks(tasks, limit)
    if answers is not None:
        aims = _aims(answers)
        rows = [replace(task, canonical=aims.get(task.id, task.canonical)) for task in rows]
    groups = {} if held_out is None else {"held_out": read_tasks(held_out)}
    if wordings is not None:
        ids = {task.id for task in rows}
        groups["wordings"] = [task for task in read_tasks(wordings) if task.id in ids]
    checker = chosen_checker(judging)
    gate = chosen_gate(gating, reference, True)
    net = load_net(model, loading)
    from lmrepair.checks import Budget, fix as repair_tasks
    from lmrepair.failures import read_reference

    budget = Budget(samples, seconds, heat, length)
    with progress_bars() as progress:
        result = repair_tasks(
            net, rows, checker, budget, chosen, gate, read_reference(reference), groups,
            canonical=canonical or answers is not None, seed=loading.seed, progress=progress,
        )  # fmt: skip
    patch = result.repair.patch if result.repair is not None else None
    if patch is not None:
        patch.save(target)
    data = fix_data(net.name, checker.sandbox.kind, result, str(target) if patch is not None else None)
    show_result(data, fix_text(data), as_json)
    raise typer.Exit(0 if result.all_right else 1)


def chosen_checker(asked: JudgeOptions) -> Checker:
    """How completions are judged, as the options say. Raises UsageError for a pattern or command that is none."""
    patterns = tuple(Forbidden.parse(text) for text in asked.forbid or ())
    lint = tuple(asked.lint or ())
    for command in lint:
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise UsageError(f"--lint {command!r}: {error}; expected a shell command as in 'ruff check -'") from error
        if not words:
            raise UsageError("--lint: the command is empty; expected one as in 'ruff check -'")
    limits = Limits(asked.cpu, asked.wall, asked.memory_mb << 20)
    return Checker(strongest(asked.unsafe), limits, patterns, lint, asked.jobs)


def _temperatures(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--temperatures {text!r}: expected numbers as in 0.3,0.6,0.9") from error


def _aims(path: Path) -> dict[str, str]:
    """Task → the answer that an earlier result of ``fix`` aimed at."""
    try:
        items = json.loads(path.read_bytes())["items"]
        found = {item["id"]: item["target"]["text"] for item in items if item["target"] is not None}
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{path}: found no result of fix ({type(error).__name__}: {error}); expected what "
                         "lmrepair fix --json prints") from error  # fmt: skip
    if not found or not all(isinstance(part, str) for pair in found.items() for part in pair):
        raise UsageError(f"{path}: found no answers in it; expected what lmrepair fix --json prints")
    return found


def _given(path: Path, tasks: Sequence[Task]) -> list[str]:
    """Completions from JSON lines, in the order of the tasks, each cut by its task's stop rule."""
    from lmrepair.failures import read_lines

    found: dict[str, str] = {}
    for number, row in read_lines(path):
        if not isinstance(row.get("completion"), str) or "task_id" not in row:
            raise UsageError(f"{path}, line {number}: expected task_id and completion")
        found[str(row["task_id"])] = row["completion"]
    missing = [task.id for task in tasks if task.id not in found]
    if missing:
        raise UsageError(f"{path}: no completion of {missing[0]!r} and {len(missing) - 1} more; expected one a task")
    return [task.cut(found[task.id]) for task in tasks]
