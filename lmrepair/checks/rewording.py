"""A task in other words, by rule: does the model know it, or the one string?"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from lmrepair.checks.tasks import Task

# The first that fits: how a docstring begins → how it could begin as well.
BEGINNINGS = (
    ("Return whether ", "Tell whether "),
    ("Check if ", "Tell whether "),
    ("Return how many ", "Count how many "),
    ("Return how ", "Tell how "),
    ("Return True if ", "Tell whether "),
    ("Return ", "Give back "),
    ("Write a function to ", "Define a function that can "),
    ("", "What is wanted: "),
)
ANEW = "do_"  # what another name for a function begins with


def reworded(task: Task) -> dict[str, Task]:
    """Rule → the task in other words; a rule that changes nothing about this task is left out.

    ``docstring``: the description begins otherwise. ``renamed``: the function has another name, in the prompt and
    where the tests call it. ``examples``: its doctest examples stand in the opposite order.
    """
    found = {name: rule(task) for name, rule in RULES.items()}
    return {name: other for name, other in found.items() if other is not None}


def _docstring(task: Task) -> Task | None:
    at = _description(task)
    if at is None:
        return None
    for beginning, other in BEGINNINGS:
        if task.prompt.startswith(beginning, at):
            return replace(task, prompt=task.prompt[:at] + other + task.prompt[at + len(beginning) :])
    return None


def _description(task: Task) -> int | None:
    """Where the words of the prompt's last docstring begin."""
    quotes = list(re.finditer(r'(?:"""|\'\'\')\s*', task.prompt))
    opening = quotes[-2] if len(quotes) > 1 and not quotes[-1].group().strip(" \n\"'") else None
    return opening.end() if opening is not None and not task.messages else None


def _renamed(task: Task) -> Task | None:
    name = task.entry_point or task.opened()
    if not name or task.messages or not re.search(rf"\b{re.escape(name)}\b", task.prompt):
        return None
    other = f"{ANEW}{name}"
    word = re.compile(rf"\b{re.escape(name)}\b")
    calls = dict(task.calls) | {name: other}
    return replace(
        task,
        prompt=word.sub(other, task.prompt),
        entry_point=other if task.entry_point else "",
        canonical=word.sub(other, task.canonical),
        calls=tuple(calls.items()),
    )


def _examples(task: Task) -> Task | None:
    found = list(re.finditer(r"^[ \t]*>>> .*\n(?:(?![ \t]*(?:>>>|\"\"\"|'''|\n)).+\n)*", task.prompt, re.MULTILINE))
    if len(found) < 2 or len({one.group() for one in found}) < 2 or task.messages:
        return None
    prompt, at = "", 0
    for one, other in zip(found, reversed(found), strict=True):
        prompt += task.prompt[at : one.start()] + other.group()
        at = one.end()
    return replace(task, prompt=prompt + task.prompt[at:])


RULES: dict[str, Callable[[Task], Task | None]] = {
    "docstring": _docstring,
    "renamed": _renamed,
    "examples": _examples,
}
