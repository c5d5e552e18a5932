"""Patches held against a gate: what they break, at which scale they pass, and which failures cost most.

What is cheap is looked at first: teacher-forced reading of what must stay, then greedy text, then KL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from lmrepair.diagnosis import diagnose
from lmrepair.errors import FailuresError, NotFiniteError, WrongModelError
from lmrepair.failures import Protected, Reference, Tokens, prompt_ids, read_kinds
from lmrepair.loop.gate import Gate
from lmrepair.loop.untouched import Measured, Untouched
from lmrepair.model import Delta, Edit, Fingerprint, Net, Product, Sites, Trial, fingerprint, greedy, settled
from lmrepair.patch import Patch

RESOLUTION = 1 / 64  # of the scale that bisection finds
GRID = 16  # scales at which it is read which failures hold

Changes = Mapping[int, Edit]


def sites_of(changes: Changes) -> Sites:
    """The neurons of the changes."""
    return Sites({layer: change.columns for layer, change in changes.items()})


@dataclass(frozen=True)
class Scaled:
    """A patch's deltas times ``scale``, for the length of a ``with`` block or as changes of their own."""

    changes: Changes
    scale: float

    @contextmanager
    def on(self, net: Net) -> Iterator[None]:
        with Trial(net, sites_of(self.changes)) as trial:
            trial.write(self._deltas())
            yield

    def made(self, net: Net) -> Changes:
        """The changes at this scale, without the neurons that it leaves bit for bit as they were."""
        if self.scale == 1:
            return self.changes
        with Trial(net, sites_of(self.changes)) as trial:
            return trial.changes(self._deltas())

    def _deltas(self) -> dict[int, Delta]:
        if self.scale == 1:
            return {layer: change.delta for layer, change in self.changes.items()}
        return {
            layer: delta.times(self.scale) if isinstance(delta := change.delta, Product) else delta * self.scale
            for layer, change in self.changes.items()
        }


@dataclass(frozen=True)
class Verdict:
    """What a patch does at one scale that it must not: ``reasons``; there are none where it passes.

    ``broken``: what no longer comes out, as far as it was looked at. ``measured``: the drift on reference text;
    None where something was broken, and where there is no limit.
    """

    scale: float
    reasons: tuple[str, ...] = ()
    broken: tuple[Tokens, ...] = ()
    measured: Measured | None = None

    @property
    def kl(self) -> dict[str, float]:
        """By the reference's name, the largest first."""
        return {name: drift.kl for name, drift in self.measured.kinds.items()} if self.measured else {}

    @property
    def passes(self) -> bool:
        return not self.reasons


@dataclass(frozen=True)
class Judgement:
    """A patch before the gate. ``verdict``: at the largest scale found at which it passes with all of its
    failures repaired; where there is none (``passes`` is False), at the least scale that repairs them all.

    ``full``: what the patch did as it was solved. ``needs``: from which scale on each failure holds.
    ``weighed``: how many scales were looked at.
    """

    verdict: Verdict
    full: Verdict
    needs: tuple[float, ...]
    weighed: int

    @property
    def passes(self) -> bool:
        return self.verdict.passes


@dataclass(frozen=True)
class Guard:
    """A gate with what the net says before the repair: what must stay, token by token.

    ``protected`` comes out in greedy text now, and ``clear`` of it under teacher forcing too; ``memory``
    holds under teacher forcing. ``given``: how many protected prompts and earlier repairs there were.
    ``untouched``: what the net says of reference text.
    """

    net: Net
    gate: Gate
    untouched: Untouched
    protected: tuple[Tokens, ...]
    clear: tuple[Tokens, ...]
    memory: tuple[Tokens, ...]
    given: tuple[int, int]

    @staticmethod
    def of(
        net: Net, gate: Gate, reference: Reference | None, failures: Sequence[Tokens], full: bool = False,
        model: Fingerprint | None = None,
    ) -> Guard:  # fmt: skip
        """Read the net as it is now; ``full``: KL is measured on all reference text, not as far as it decides;
        ``model``: the net's fingerprint, where it is known.

        Raises WrongModelError for a patch in memory that was made for another model, FailuresError where
        one of the failures asks for what the gate forbids.
        """
        model = model or fingerprint(net, {})
        _refuse_other_models(net, model, gate.memory)
        earlier = {
            (item.tokens.prompt, item.tokens.target): item.tokens
            for patch in gate.memory
            for item in patch.items
            if item.repaired
        }
        memory = tuple(item.tokens for item in diagnose(net, list(earlier.values())) if not item.mistakes)
        protected = present(net, gate.protect)
        for kept, what in ((memory, "an earlier repair in memory"), (protected, "a protected prompt")):
            _refuse_opposites(failures, kept, what)
        clear = tuple(item.tokens for item in diagnose(net, protected) if not item.mistakes)
        references = gate.references or ((reference,) if reference is not None else tuple(read_kinds()))
        untouched = Untouched.of(net, references, full, model)
        return Guard(net, gate, untouched, protected, clear, memory, (len(gate.protect), len(earlier)))

    def weigh(self, changes: Changes, scale: float) -> Verdict:
        """What the changes times ``scale`` do that they must not; the net is as it was afterwards."""
        try:
            return self._weigh(changes, scale)
        except NotFiniteError:
            return Verdict(scale, ("what the model writes is no number any more",))

    def _weigh(self, changes: Changes, scale: float) -> Verdict:
        broken = self._broken(changes, scale)
        if broken:
            return Verdict(scale, self._said(broken), broken)
        if self.gate.max_kl == math.inf:
            return Verdict(scale)
        measured = self.untouched.measure(Scaled(changes, scale), self.gate.max_kl)
        worst, most = next(iter(measured.kinds.items()))
        if not most.kl <= self.gate.max_kl:
            said = f"KL is {most.kl:.5f} nats/token on {worst}, at most {self.gate.max_kl:g} allowed"
            return Verdict(scale, (said,), (), measured)
        return Verdict(scale, (), (), measured)

    def _broken(self, changes: Changes, scale: float) -> tuple[Tokens, ...]:
        """Earlier repairs and protected prompts that come out otherwise with the changes."""
        if not self.memory and not self.protected:
            return ()
        with Scaled(changes, scale).on(self.net):
            found = diagnose(self.net, [*self.memory, *self.clear])
            broken = tuple(item.tokens for item in found if item.mistakes)
            unwritten = () if broken else self._unwritten((*self.memory, *self.protected))
        if not unwritten:
            return broken
        before = self._unwritten(unwritten)  # earlier repairs that a near tie keeps from being written
        return tuple(item for item in unwritten if item not in before)

    def _unwritten(self, kept: Sequence[Tokens]) -> tuple[Tokens, ...]:
        """What the net as it is now does not write in free greedy text."""
        written = greedy(self.net, kept, until_wrong=True)
        return tuple(item for item, text in zip(kept, written, strict=True) if text != item.target)

    def _said(self, broken: Sequence[Tokens]) -> tuple[str, ...]:
        parts = []
        for kept, what in ((self.memory, "earlier repairs"), (self.protected, "protected prompts")):
            lost = [item for item in broken if item in kept]
            if lost:
                parts.append(f"{len(lost)} of {len(kept)} {what} come out otherwise (first: {lost[0].id!r})")
        return tuple(parts)

    def judge(self, changes: Changes, failures: Sequence[Tokens], report: Callable[[int], None]) -> Judgement:
        """Look for the largest scale at which the patch passes and still repairs all of ``failures``."""
        report(1)
        full = self.weigh(changes, 1.0)
        if full.passes:
            return Judgement(full, full, (), 1)
        needs = needed_scales(self.net, changes, failures)
        least = max(needs)
        if least == 1:
            return Judgement(full, full, needs, 1)
        report(2)
        low = self.weigh(changes, least)
        if not low.passes:
            return Judgement(low, full, needs, 2)
        best, weighed = self.largest(changes, low, full, lambda count: report(count + 2))
        return Judgement(best, full, needs, weighed + 2)

    def largest(
        self, changes: Changes, low: Verdict, high: Verdict, report: Callable[[int], None] = lambda _: None
    ) -> tuple[Verdict, int]:
        """The verdict at the largest scale that passes, by bisection between one that does and one that does not.

        Also how many scales were looked at.
        """
        weighed = 0
        while high.scale - low.scale > RESOLUTION:
            weighed += 1
            report(weighed)
            tried = self.weigh(changes, (low.scale + high.scale) / 2)
            low, high = (tried, high) if tried.passes else (low, tried)
        return low, weighed

    def cheapest_first(self, failures: Sequence[Tokens], judged: Judgement, sites: Sites) -> list[int]:
        """The failures' indices by what they cost, the dearest last.

        Where the patch broke something: by how fast the loss of what broke rises along each failure's own
        descent direction. Where its KL is too large: by the share of the patch that each failure needs.
        """
        costs: Sequence[float] = judged.needs
        if judged.verdict.broken:
            costs = conflicts(self.net, failures, judged.verdict.broken, sites)
        return sorted(range(len(failures)), key=lambda index: (costs[index], index))


def present(net: Net, protect: Sequence[Protected]) -> tuple[Tokens, ...]:
    """What of the protected comes out of the net's greedy text now, with the answer it gives."""
    wanted = []
    for number, item in enumerate(protect, start=1):
        name = item.failure.id or str(number)
        if item.failure.target:
            wanted += net.tokenize([item.failure])
            continue
        prompt = prompt_ids(item.failure, net.tokenizer)
        room = item.length if net.anatomy.context is None else min(item.length, net.anatomy.context - len(prompt))
        if room < 1:
            raise FailuresError(
                f"protected prompt {name!r} takes {len(prompt)} tokens, which leaves no room for an answer; shorten it"
            )
        wanted.append(Tokens(name, prompt, (-1,) * room))
    written = greedy(net, wanted)
    return tuple(
        replace(item, target=text)
        for item, text in zip(wanted, written, strict=True)
        if item.target[0] < 0 or text == item.target
    )


def needed_scales(net: Net, changes: Changes, failures: Sequence[Tokens]) -> tuple[float, ...]:
    """From which scale of a patch on, up to 1, each failure holds under teacher forcing; on a grid of 16."""
    needs = [1.0] * len(failures)
    going = list(range(len(failures)))
    for step in range(GRID - 1, 0, -1):
        with Scaled(changes, step / GRID).on(net):
            found = diagnose(net, [failures[index] for index in going])
        going = [index for index, item in zip(going, found, strict=True) if not item.mistakes]
        for index in going:
            needs[index] = step / GRID
        if not going:
            break
    return tuple(needs)


def conflicts(net: Net, failures: Sequence[Tokens], broken: Sequence[Tokens], sites: Sites) -> list[float]:
    """How fast the cross-entropy of ``broken`` rises, to first order, on each failure's own way downhill."""
    with settled(net.model):
        lost = net.read(net.batches(broken), sites).gradients
        costs = []
        for failure in failures:
            own = net.read(net.batches([failure]), sites).gradients
            along = sum(float((own[layer] * lost[layer]).sum()) for layer in own)
            length = math.sqrt(sum(float(own[layer].square().sum()) for layer in own))
            costs.append(-along / length if length else 0.0)
    return costs


def _refuse_other_models(net: Net, now: Fingerprint, memory: Sequence[Patch]) -> None:
    for number, patch in enumerate(memory, start=1):
        which = f"patch {number} in memory was made for {patch.made.model!r}"
        if patch.dtype != net.dtype:
            names = [str(dtype).removeprefix("torch.") for dtype in (patch.dtype, net.dtype)]
            raise WrongModelError(f"{which} in {names[0]}, the model is in {names[1]}; load it with dtype {names[0]}")
        if patch.fingerprint.body != now.body or len(patch.fingerprint.layers) != len(now.layers):
            raise WrongModelError(
                f"{which}, and this is another model; leave the patch out, or load the model it is for"
            )


def _refuse_opposites(failures: Sequence[Tokens], kept: Sequence[Tokens], what: str) -> None:
    answers: dict[tuple[int, ...], list[Tokens]] = {}
    for item in kept:
        answers.setdefault(item.prompt, []).append(item)
    for failure in failures:
        for item in answers.get(failure.prompt, []):
            both = min(len(item.target), len(failure.target))
            if item.target[:both] != failure.target[:both]:
                raise FailuresError(
                    f"failure {failure.id!r} wants another answer than {what} ({item.id!r}) has now for the same "
                    "prompt; no model can give both: leave one of them out"
                )
