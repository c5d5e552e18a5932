"""A method's steps on a trial: what is made once for a net, the modes, and the best state so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from lmrepair.diagnosis import Diagnosis, Heard, Probe, diagnoses, listening
from lmrepair.errors import NotFiniteError, UsageError
from lmrepair.failures import Failure, Tokens, Wordings
from lmrepair.methods import Method, Problem
from lmrepair.methods.maths import Bases
from lmrepair.model import (
    Batch,
    Delta,
    Metric,
    Net,
    Preference,
    Progress,
    Reading,
    Sites,
    Statistics,
    Trial,
    give_back,
    no_change,
    settled,
    statistics_of,
)

WORTH_SAYING = 1 << 28  # bytes of memory
PREFIX = 12  # tokens of a text that is put before a prompt
Read = TypeVar("Read")
NO_NUMBER = "what it writes is no number any more"
SCREEN = 0.25  # share of the bound on the probe's KL that prompts' own states may reach before the probe is read


@dataclass(frozen=True)
class Known:
    """What is made once for a net and a method: semantic bases, and the metric if the method asks for one."""

    bases: Bases
    metric: Metric | None
    seconds: float

    @staticmethod
    def of(
        net: Net, method: Method, failures: Sequence[Failure], statistics: Statistics | None, progress: Progress
    ) -> Known:
        """For a method as it is ``suited`` to what is solved together."""
        bases = Bases.of(net, gain=bool(getattr(method, "gain", False)))
        if method.steers:
            _ = bases.exact  # once for all failures, and in no failure's time
        asked, began = method.asks(), time.perf_counter()
        if asked is None:
            return Known(bases, None, 0.0)
        if statistics is None:
            statistics = statistics_of(net, asked, asked.alike(failures), progress=progress)
        metric, sites = Metric.of(statistics, asked.damping), method.fixed_sites(net)
        for layer in sites.columns if sites is not None else ():
            metric.make(layer)  # what is written to whole, whatever the mistakes are
        give_back()
        return Known(bases, metric, time.perf_counter() - began)


def drawn_wordings(net: Net, paraphrases: bool, prefixes: int, seed: int = 0) -> Wordings:
    """Wordings with ``prefixes`` texts that the model writes by itself (after MEMIT, arXiv 2210.07229)."""
    if prefixes < 0:
        raise UsageError(f"prefixes is {prefixes}; expected a number of texts, 0 or more")
    if not prefixes:
        return Wordings(paraphrases)
    with settled(net.model):
        written = net.sample(prefixes, PREFIX, seed)
    texts = (str(net.tokenizer.decode(list(item.target), skip_special_tokens=True)) for item in written)
    return Wordings(paraphrases, tuple(text.rstrip() + "\n" for text in texts))


@dataclass
class _Looks:
    """What was seen of all failures between problems: ``found`` at ``deltas``, the last state that was looked at;
    ``kept`` the best of them, with how many failures were ``right`` then, and by the margin, and what was
    ``preferred``.
    """

    kept: Mapping[int, Delta]
    right: tuple[int, int] = (-1, -1)
    preferred: Preference | None = None
    found: Sequence[Diagnosis] = ()
    deltas: Mapping[int, Delta] | None = None


class Solver:
    """Runs a method's steps on a trial, in the mode the method asks for, and keeps count."""

    def __init__(
        self,
        net: Net,
        method: Method,
        known: Known,
        sites: Sites,
        trial: Trial,
        progress: Progress,
        heard: Mapping[Tokens, Tensor] | None = None,
        first: Reading | None = None,
    ) -> None:
        """``heard``: states of the failures' prompts in the net as it is, as ``listening`` keeps them; ``first``: their
        ``first_reading``, which is let go of where the first step is made."""
        self.net, self.method, self.known, self.sites = net, method, known, sites
        self.trial, self.progress, self.heard = trial, progress, heard or {}
        self.deltas: Mapping[int, Delta] = {
            layer: no_change(len(columns), net.hidden, net.device) for layer, columns in sites.columns.items()
        }
        self.start = self.deltas
        self.steps = 0
        self._first = first
        self.groups: list[list[Tokens]] = []  # the failures of each problem, in order
        self.stopped = ""  # why the steps were stopped, if they were destroying the model
        self._probe: Probe | None = None
        self.converged = False  # whether the last problem ended because nothing was left to do
        self.preferred: Preference | None = None  # in the batches of the last solve; None where that was not read

    def now(self, batches: Sequence[Batch]) -> Preference:
        """What is preferred now in the batches that were solved."""
        return self.preferred if self.preferred is not None else self.net.prefer(batches)

    def solve(self, batches: Sequence[Batch], found: Sequence[Diagnosis]) -> None:
        """Work on the failures that have mistakes, in the method's mode.

        What is too much for one problem is solved group by group, in turn, in as many rounds as it takes.
        """
        self.groups = self.groups or self.method.groups(self.net, [item.tokens for item in found], self.sites)
        if len(self.groups) == 1 and self.method.mode != "iterative":
            self._run(batches)
            return
        if self.method.mode == "multi-failure":
            self.method = replace(self.method, mode="batch")
        work: Callable[[Sequence[Tokens]], None] = self._iterate if self.method.mode == "iterative" else self._one
        looks = _Looks(self.deltas)
        for turn in range(self.method.rounds if self.method.early else 1):
            start = self.deltas
            try:
                for _ in self._round(found, work):
                    # In the first round most are still to come; later one group's turn may be all that it takes.
                    if turn and self._all_right(batches, looks):
                        return
                if self.deltas is not looks.deltas and self._all_right(batches, looks):
                    return
            except NotFiniteError:
                if self.deltas is start:
                    raise
                self._undo(start, NO_NUMBER)  # one failure's steps can do that to another one's prompt
                break
            found = looks.found
            if self.stopped or self.deltas is start:  # another round would do the same again
                break
        self._move(looks.kept)
        self.preferred = looks.preferred

    def _round(self, found: Sequence[Diagnosis], work: Callable[[Sequence[Tokens]], None]) -> Iterator[None]:
        """Work on each group that has mistakes; stops after each."""
        left = iter(found)
        for number, group in enumerate(self.groups):
            self.progress("failures", number, len(self.groups))
            mine = list(islice(left, len(group)))
            if any(item.mistakes for item in mine) and not self.stopped:
                work(group)
                yield

    def _all_right(self, batches: Sequence[Batch], looks: _Looks) -> bool:
        """Read all failures anew; whether there is nothing left to do."""
        self.preferred = self.net.prefer(batches)
        looks.found, looks.deltas = diagnoses(batches, self.preferred, self.method.margin), self.deltas
        safe = sum(not item.mistakes for item in looks.found)
        right = _right(batches, self.preferred), safe
        if right > looks.right:
            looks.right, looks.kept, looks.preferred = right, self.deltas, self.preferred
        self.converged = self.method.early and safe == len(looks.found)
        return self.converged

    def _move(self, deltas: Mapping[int, Delta]) -> None:
        """Write what is another change than before."""
        self.trial.write({layer: delta for layer, delta in deltas.items() if delta is not self.deltas.get(layer)})
        self.deltas = deltas

    def _one(self, group: Sequence[Tokens]) -> None:
        self._run(self.net.batches(group))

    def _iterate(self, group: Sequence[Tokens]) -> None:
        """One mistake after another, in the order of the target."""
        (tokens,) = group
        batches = self.net.batches(group)
        position, memory = 0, None
        while position < len(tokens.target) and not self.stopped:
            (found,) = diagnoses(batches, self.net.prefer(batches), self.method.margin)
            ahead = [mistake.position for mistake in found.mistakes if mistake.position >= position]
            if not ahead:
                return
            focus = torch.zeros(len(tokens.target), dtype=torch.bool, device=self.net.device)
            focus[ahead[0]] = True
            memory = self._run(batches, focus, memory)
            position = ahead[0] + 1

    def _run(self, batches: Sequence[Batch], focus: Tensor | None = None, earlier: Any = None) -> Any:
        """At most ``epochs`` steps on one problem; the best state of several failures is the one that stays.

        ``earlier`` is what the method remembers of the problem before; what it remembers now is returned.
        """
        method = self.method
        margin = _margin(method)
        rows = sum(len(batch.rows) for batch in batches)
        everywhere = torch.ones(rows, dtype=torch.bool, device=self.net.device)
        several = sum(len(batch.tokens) for batch in batches) > 1 and method.early
        start = self.deltas
        best, kept, memory = -1, start, earlier
        preferred: Preference | None = None  # with ``kept``
        untouched = {tokens: self.heard[tokens] for batch in batches for tokens in batch.tokens if tokens in self.heard}
        heard = Heard.of(self.net, untouched) if method.max_probe_kl < float("inf") else None
        safe = start  # the last state that was looked at
        for step in range(method.epochs):
            self.progress("steps", step, method.epochs)
            reading, self._first = self._first, None
            if reading is None:
                remembered = memory if step else None
                read = partial(method.read, self.net, batches, self.sites, focus, margin, remembered)
                reading = self._followed(batches, heard, safe, read)
            if reading is None:
                break
            self.preferred, safe = reading.preference, self.deltas
            if several:
                right = _right(batches, reading.preference)
                if right > best:
                    best, kept, preferred = right, self.deltas, reading.preference
            self.converged = reading.done
            if self.converged:
                return memory
            problem = Problem(
                self.net, tuple(batches), self.sites, reading, everywhere if focus is None else focus,
                self.deltas, self.known.bases, step, memory, self.known.metric, self._moved,
            )  # fmt: skip
            try:
                answer = method.solve(problem)
            except NotFiniteError:
                self._undo(safe, NO_NUMBER)
                break
            memory = answer.memory
            self._move(answer.deltas)
            self.steps, self.preferred = self.steps + 1, None
            del reading, problem, answer  # large, and not to be held while the next one is read
        else:
            self.preferred = self._followed(batches, heard, safe, lambda: self.net.prefer(batches))
        if not several and not method.undoes:
            return memory
        last = self.preferred = self.now(batches)
        if method.undoes:
            kept, preferred, worse = start, None, not last.holds(focus, method.margin)
        else:
            worse = _right(batches, last) < best
        if worse:
            self._move(kept)
            self.preferred = preferred
        return earlier if worse and method.undoes else memory

    def _moved(self, deltas: Mapping[int, Delta]) -> float:
        """KL on the probe with a whole change, which stays written."""
        if self._probe is None:
            self._move(self.start)
            self._probe = Probe.of(self.net)
        self._move(deltas)
        return self._probe.kl()

    def _followed(
        self, batches: Sequence[Batch], heard: Heard | None, safe: Mapping[int, Delta], read: Callable[[], Read]
    ) -> Read | None:
        """What is ``read`` now; None where the steps since ``safe`` destroy the model, and are undone."""
        try:
            with listening(self.net, batches) as now:
                made = read()
        except NotFiniteError:
            if self.deltas is safe:
                raise
            self._undo(safe, NO_NUMBER)
            return None
        return None if self.deltas is not safe and self._ruined(heard, now, safe) else made

    def _ruined(self, heard: Heard | None, now: Mapping[Tokens, Tensor], safe: Mapping[int, Delta]) -> bool:
        """Whether the model is being destroyed; then the change is the last ``safe`` one again.

        Where the failures' own prompts say hardly anything else than before, the probe is not read.
        """
        most = self.method.max_probe_kl
        if most == float("inf"):
            return False
        own = heard.kl(self.net, now) if heard is not None else None
        if own is not None and own <= SCREEN * most:
            return False
        kl = self._moved(self.deltas)
        if kl <= most:
            return False
        self._undo(safe, f"KL {kl:.3g} nats per token on a few positions of reference text, at most {most:g} allowed")
        return True

    def _undo(self, safe: Mapping[int, Delta], reason: str) -> None:
        self.stopped = (
            f"stopped at step {self.steps}, which was undone: it destroys the model ({reason}); "
            "try smaller steps, or allow more (max_probe_kl)"
        )
        self._move(safe)
        self.preferred, self.converged = None, False


def say_memory(net: Net, method: Method, tokens: Sequence[Tokens], sites: Sites, progress: Progress) -> None:
    """Report how much a solve may keep at most, where that is much, before it starts."""
    needed = method.needed(net, tokens, sites)
    if needed >= WORTH_SAYING:
        groups = len(method.groups(net, tokens, sites)) if method.mode == "multi-failure" else 1
        turns = f", in {groups} groups of failures, one after another" if groups > 1 else ""
        progress(f"gradients: at most {needed / 1e9:.1f} GB{turns}", 0, 1)


def first_reading(net: Net, method: Method, batches: Sequence[Batch], progress: Progress) -> Reading | None:
    """The reading that a method's first step is solved from, with what is preferred before the repair.

    None where the method has to know the mistakes first, or looks at them one by one.
    """
    tokens = [item for batch in batches for item in batch.tokens]
    sites = method.fixed_sites(net) if method.mode != "iterative" else None
    if sites is None or len(method.groups(net, tokens, sites)) > 1:
        return None
    say_memory(net, method, tokens, sites, progress)
    return method.read(net, batches, sites, None, _margin(method))


def _margin(method: Method) -> float | None:
    return method.margin if method.early else None


def _right(batches: Sequence[Batch], preference: Preference) -> int:
    """How many failures are preferred at every position."""
    return sum(not item.mistakes for item in diagnoses(batches, preference))
