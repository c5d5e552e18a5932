"""The page of results of ``lmrepair fix``: each task with what was written before and after, and what it cost."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from lmrepair.bench.report.figures import NOTHING, Measure, Shown, compared, number
from lmrepair.bench.report.fixes import Aim, Fix, Group, Ran, Task
from lmrepair.bench.report.sheet import filled
from lmrepair.bench.report.tables import PERCENT, Table
from lmrepair.measure import visible

POINTS = Measure("", "", PERCENT, 1)
KL = Measure("", "", 1, 5)
WORDS = re.compile(r"\w+|\s+|[^\w\s]")


@dataclass(frozen=True)
class Piece:
    """A stretch of a completion; ``new``: the other one, before or after, does not have it."""

    text: str
    new: bool


@dataclass(frozen=True)
class Side:
    """A completion as it is shown, with its outcome."""

    pieces: tuple[Piece, ...]
    ran: Ran


@dataclass(frozen=True)
class View:
    """A task as it is shown."""

    task: Task
    prompt: str
    before: Side
    after: Side
    target: str
    source: str
    wordings: tuple[tuple[str, Side, Side], ...]
    rejected: tuple[tuple[str, Ran], ...]

    @property
    def state(self) -> str:
        """What became of the task, in words."""
        if self.task.before.passed:
            return "passed before and after" if self.task.after.passed else "broken"
        return "repaired" if self.task.after.passed else "not repaired" if self.target else "out of reach"


def fix_page(fixes: Sequence[Fix]) -> str:
    """The results as HTML. Everything that came from a prompt or a model is escaped."""
    shown = [(fix, f"fix-{at}", _facts(fix), _tables(fix), [_view(task) for task in fix.tasks])
             for at, fix in enumerate(fixes, start=1)]  # fmt: skip
    title = fixes[0].name if len(fixes) == 1 else ", ".join(dict.fromkeys(fix.model for fix in fixes))
    return filled(
        "fix.html",
        ("page.css", "fix.css"),
        title=title,
        fixes=shown,
        comparison=_comparison(fixes) if len(fixes) > 1 else None,
    )


def marked(before: str, after: str) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Both texts in pieces, word by word: what only the one or only the other has is new."""
    one, other = WORDS.findall(before), WORDS.findall(after)
    left: list[Piece] = []
    right: list[Piece] = []
    for kind, a, b, c, d in SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        left.append(Piece(_lines("".join(one[a:b])), kind != "equal"))
        right.append(Piece(_lines("".join(other[c:d])), kind != "equal"))
    return tuple(piece for piece in left if piece.text), tuple(piece for piece in right if piece.text)


def _lines(text: str) -> str:
    """Text with its line ends; what else does not print is spelled out."""
    return "\n".join(visible(line, None) for line in text.split("\n"))


def _sides(before: Ran, after: Ran) -> tuple[Side, Side]:
    left, right = marked(before.completion, after.completion)
    return Side(left, before), Side(right, after)


def _view(task: Task) -> View:
    before, after = _sides(task.before, task.after)
    return View(
        task,
        _lines(task.prompt),
        before,
        after,
        _lines(task.aim.text.rstrip("\n")) if task.aim is not None else "",
        _source(task, task.aim),
        tuple((rule, *_sides(first, second)) for rule, first, second in task.wordings),
        tuple((_lines(ran.completion), ran) for ran in task.rejected),
    )


def _source(task: Task, aim: Aim | None) -> str:
    if aim is None:
        return ""
    unlikely = f"{aim.nats:.1f} nats"
    if aim.source == "sample":
        heat = "" if aim.temperature is None else f" at temperature {aim.temperature:g}"
        return f"the model’s own sample{heat}, {unlikely}; {task.passing} passing among {task.samples} samples"
    tried = f"; none of {task.samples} samples passes" if task.samples else ""
    return f"the given solution, {unlikely}{tried}"


def _facts(fix: Fix) -> list[tuple[str, str]]:
    counts, cost = fix.counts, fix.cost
    reach, before, after = (counts[key] for key in ("in_reach", "passing_before", "passing_after"))
    own = sum(task.aim is not None and task.aim.source == "sample" for task in fix.tasks)
    out, taken = counts["tasks"] - before - reach, _many(cost.get("samples", 0), "sample")
    facts = [
        ("model", fix.model),
        ("method", fix.method),
        (
            "passing",
            f"{before} before, {counts['passing_after']} after, of {counts['tasks']}; {counts['broken']} broken",
        ),
        ("repaired", f"{counts['repaired']} of {reach} in reach, {out} out of reach"),
        ("aimed at", f"{_many(own, 'own sample')}, {_many(reach - own, 'given solution')}; {taken} taken"),
    ]
    if fix.drift:
        agreement = f"{fix.drift['agreement']:.2%} of top tokens unchanged, over {fix.drift['tokens']:.0f} tokens"
        facts.append(("drift", f"KL {number(fix.drift['kl'], KL)} nats per token, {agreement}"))
    facts.append(("patch", f"{cost.get('neurons', 0):,.0f} neurons, {cost.get('bytes', 0) / 1e6:.1f} MB"))
    return [*facts, ("sandbox", fix.sandbox)]


def _many(count: float, what: str) -> str:
    return f"{count:.0f} {what}" + ("" if count == 1 else "s")


def _tables(fix: Fix) -> list[tuple[str, Table]]:
    found = []
    if fix.groups:
        rows = tuple((group.title, _group(group)) for group in fix.groups)
        columns = ("tasks", "passing before", "after", "difference, points")
        found.append(("What was not repaired, before and after", Table(columns, (("", rows),))))
    total, work = sum(fix.seconds.values()), f"{fix.cost.get('forward_equivalents', 0):.0f} forward equivalents"
    parts = [(part, (Shown(f"{value:.1f} s"), Shown(f"{value / (total or 1):.0%}")))
             for part, value in fix.seconds.items()]  # fmt: skip
    parts.append(("all", (Shown(f"{total:.1f} s"), Shown(work))))
    found.append(("Time by part", Table(("seconds", "share"), (("", tuple(parts)),))))
    if fix.kinds:
        kinds = tuple((kind.partition("@")[0], (Shown(number(kl, KL)),)) for kind, kl in fix.kinds)
        found.append(("Drift by kind of text, nats per token", Table(("KL",), (("", kinds),))))
    return found


def _group(group: Group) -> tuple[Shown, ...]:
    counts = (Shown(str(group.tasks)), Shown(str(group.before)), Shown(str(group.after)))
    return (*counts, compared(group.difference, POINTS))


def _comparison(fixes: Sequence[Fix]) -> Table:
    columns = (
        "in reach",
        "own samples",
        "repaired",
        "broken",
        "reworded",
        "held out, points",
        "KL",
        "agreement",
        "patch",
    )
    blocks: dict[str, list[tuple[str, tuple[Shown, ...]]]] = {}
    for fix in fixes:
        groups = {group.title: group for group in fix.groups}
        worded, apart = (groups.get(title) for title in ("repaired tasks, reworded by rule", "held-out tasks"))
        own = sum(task.aim is not None and task.aim.source == "sample" for task in fix.tasks)
        counts = [str(value) for value in (fix.counts["in_reach"], own, fix.counts["repaired"], fix.counts["broken"])]
        figures = (
            *map(Shown, counts),
            Shown(f"{worded.before} → {worded.after}", f"of {worded.tasks}") if worded else NOTHING,
            compared(apart.difference, POINTS) if apart else NOTHING,
            Shown(number(fix.drift["kl"], KL)) if fix.drift else NOTHING,
            Shown(f"{fix.drift['agreement']:.2%}") if fix.drift else NOTHING,
            Shown(f"{fix.cost.get('bytes', 0) / 1e6:.1f} MB"),
        )
        blocks.setdefault(fix.model, []).append((f"{fix.name} ({fix.method})", figures))
    return Table(columns, tuple((model, tuple(rows)) for model, rows in blocks.items()))
