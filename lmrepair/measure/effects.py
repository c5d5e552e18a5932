"""What a patch does beside its repairs: to other wordings (generalisation) and to look-alikes (specificity).

Every figure is read twice, from the net as it is and with the patch on it, on the same token ids.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lmrepair.errors import FailuresError, UsageError
from lmrepair.failures import Failure, Tokens
from lmrepair.measure.answer import Answer, Scores, answers, scores
from lmrepair.measure.drift import Edit
from lmrepair.measure.texts import code_tokens
from lmrepair.model import Net

KINDS = ("paraphrases", "context", "case")


@dataclass(frozen=True)
class Standing:
    """Where the wanted tokens stand: means over a probe's positions, then over the probes.

    ``match``: share of positions preferred. ``exact``: share of targets preferred whole. ``rank``: of the
    wanted token, 1 the best; a mean that single bad positions can carry, so ``reciprocal_rank`` (1/rank,
    between 0 and 1) stands beside it. ``gap``: p(wanted) − p(best other token), between −1 and 1.
    """

    match: float
    exact: float
    rank: float
    reciprocal_rank: float
    gap: float

    @staticmethod
    def of(found: Sequence[Answer]) -> Standing:
        return Standing(
            statistics.fmean(item.match for item in found),
            statistics.fmean(item.right == len(item.preferred) for item in found),
            statistics.fmean(statistics.fmean(item.rank) for item in found),
            statistics.fmean(statistics.fmean(1 / rank for rank in item.rank) for item in found),
            statistics.fmean(statistics.fmean(item.gap) for item in found),
        )


@dataclass(frozen=True)
class Effect:
    """Probes before and after. ``unchanged``: share of positions at which the model prefers the token it
    preferred before, right or wrong (mean over probes); ``unchanged_texts``: share of probes whose free
    greedy text is the same, None if nothing was generated.
    """

    probes: int
    before: Standing
    after: Standing
    unchanged: float
    unchanged_texts: float | None


@dataclass(frozen=True)
class SideEffects:
    """Effects by kind. ``generalisation``: the same target asked for otherwise. ``specificity``: neighbours,
    None where no pool was given. ``skipped``: probes that the model has no room for.
    """

    generalisation: Mapping[str, Effect]
    specificity: Effect | None
    skipped: int


def effect(before: Sequence[Answer], after: Sequence[Answer]) -> Effect:
    """Compare the answers to the same probes without and with a patch."""
    if not before or [item.tokens for item in before] != [item.tokens for item in after]:
        raise UsageError(f"{len(before)} answers before and {len(after)} after; expected the same probes in both")
    pairs = list(zip(before, after, strict=True))
    same = [statistics.fmean(a == b for a, b in zip(old.preferred, new.preferred, strict=True)) for old, new in pairs]
    texts = None
    if all(old.written is not None and new.written is not None for old, new in pairs):
        texts = statistics.fmean(old.written == new.written for old, new in pairs)
    return Effect(len(pairs), Standing.of(before), Standing.of(after), statistics.fmean(same), texts)


def probes(failure: Failure, example: Failure | None = None) -> dict[str, list[Failure]]:
    """Other prompts that want the failure's target, by kind.

    ``paraphrases``: the row's own. ``context``: ``example``, prompt and target, in front of the prompt.
    ``case``: the prompt in lower case; where it is that already, with its first letter in upper case.
    A kind that the failure gives no probe of is an empty list.
    """
    asked = failure.asked
    found: dict[str, list[Failure]] = {kind: [] for kind in KINDS}
    found["paraphrases"] = failure.otherwise()
    if example is not None:
        found["context"] = [_after(example, failure)]
    lower = asked.lower()
    other = lower if lower != asked else _capitalised(asked)
    if other != asked:
        found["case"] = [failure.asking(other)]
    return {
        kind: [replace(row, id=f"{failure.id}.{kind}.{at}", paraphrases=()) for at, row in enumerate(rows)]
        for kind, rows in found.items()
    }


def _after(example: Failure, failure: Failure) -> Failure:
    if failure.messages and example.messages:
        return replace(failure, messages=(*example.answered(), *failure.messages))
    joint = "" if example.target.endswith("\n") else "\n"
    return failure.asking(f"{example.asked}{example.target}{joint}{failure.asked}")


def _capitalised(text: str) -> str:
    at = next((at for at, character in enumerate(text) if character.upper() != character), None)
    return text if at is None else text[:at] + text[at].upper() + text[at + 1 :]


def neighbours(failure: Failure, pool: Sequence[Failure], count: int = 5) -> list[Failure]:
    """The rows of a pool whose prompts share most tokens with the failure's but want something else.

    Likeness is the Jaccard index of the prompts' sets of code tokens, case folded; earlier rows win ties.
    Rows that share no token, want the same target, or ask in one of the failure's own wordings are no neighbours.
    """
    own = {failure.asked, *(other.asked for other in failure.otherwise())}
    words = _words(failure.asked)
    likeness = []
    for at, row in enumerate(pool):
        theirs = _words(row.asked)
        shared = len(words & theirs)
        if shared and row.target.strip() != failure.target.strip() and row.asked not in own:
            likeness.append((-shared / len(words | theirs), at))
    return [pool[at] for _, at in sorted(likeness)[:count]]


def _words(text: str) -> frozenset[str]:
    return frozenset(token.casefold() for token in code_tokens(text))


def side_effects(
    net: Net, patch: Edit, failures: Sequence[Failure], pool: Sequence[Failure] = (), count: int = 5
) -> SideEffects:
    """The effect of one patch on probes of the failures it was made for, and on their ``count`` neighbours.

    ``pool``: other rows of the same task. The example before a prompt is the first row of the pool
    (or of the failures) that wants another target. Free text is compared for the neighbours alone.
    """
    mine = {failure.asked for failure in failures}
    others = [row for row in pool if row.asked not in mine]
    sets: dict[str, list[Failure]] = {kind: [] for kind in KINDS}
    near: dict[str, Failure] = {}
    for failure in failures:
        example = next((row for row in [*others, *failures] if _fits_before(row, failure)), None)
        for kind, rows in probes(failure, example).items():
            sets[kind] += rows
        near.update((row.asked, row) for row in neighbours(failure, others, count))
    tokens = {kind: _tokens(net, rows) for kind, rows in sets.items()}
    around = _tokens(net, list(near.values()))
    skipped = sum(map(len, sets.values())) + len(near) - sum(map(len, tokens.values())) - len(around)
    every = [item for rows in tokens.values() for item in rows]
    before, before_around = answers(net, every, generate=False), answers(net, around)
    with patch.on(net):
        after = answers(net, every, generate=False)
        after_around = answers(net, around, drafts=[item.written or () for item in before_around])
    generalisation, at = {}, 0
    for kind, asked in tokens.items():
        here = slice(at, at := at + len(asked))
        if asked:
            generalisation[kind] = effect(before[here], after[here])
    return SideEffects(generalisation, effect(before_around, after_around) if around else None, skipped)


def _fits_before(example: Failure, failure: Failure) -> bool:
    alike = example.target.strip() == failure.target.strip() or example.asked == failure.asked
    return not alike and bool(example.messages) == bool(failure.messages)


def _tokens(net: Net, rows: Sequence[Failure]) -> list[Tokens]:
    """The rows that fit the model: an example in front can make a prompt longer than its context."""
    found = []
    for row in rows:
        try:
            found += net.tokenize([row])
        except FailuresError:
            continue
    return found


@dataclass(frozen=True)
class HeldOut:
    """Scores on rows that no patch was made for, untouched and with each patch on its own (overfitting)."""

    before: Scores
    after: tuple[Scores, ...]


def held_out_scores(
    net: Net, patches: Sequence[Edit], rows: Sequence[Failure | Tokens], texts: bool = True, generate: bool = False
) -> HeldOut:
    """Score the rows before and after each patch. Under teacher forcing alone, unless ``generate``.

    ``texts``: BLEU, ROUGE-L and edit similarity too (the extra ``bench``).
    """
    tokens = [row if isinstance(row, Tokens) else net.tokenize([row])[0] for row in rows]
    before = scores(net, answers(net, tokens, generate), texts)
    after = []
    for patch in patches:
        with patch.on(net):
            found = answers(net, tokens, generate)
        after.append(scores(net, found, texts))
    return HeldOut(before, tuple(after))
