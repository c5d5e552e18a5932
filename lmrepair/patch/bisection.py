"""Which of an ordered list of patches broke something, by halving."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from lmrepair.errors import UsageError, WrongModelError
from lmrepair.model import Net
from lmrepair.patch.compose import combine
from lmrepair.patch.patch import Patch


def first_bad(count: int, good: Callable[[int], bool | None]) -> tuple[int, list[int]]:
    """The number of the first patch (from 1) with which ``good`` is no more, and every state that was looked at.

    ``good(k)`` says whether all is well with the first k patches; None: that state cannot be judged, another is
    taken. Raises UsageError where nothing is bad with all, where something is bad without any, or where states
    that cannot be judged hide the first bad one.
    """
    seen = {0: good(0)}
    if seen[0] is not True:
        raise UsageError("the check fails on the model without any patch; no patch broke it")
    seen[count] = good(count)
    if seen[count] is not False:
        raise UsageError("the check passes with all the patches; there is nothing to find")
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        inside = sorted(range(low + 1, high), key=lambda state: abs(state - middle))
        state = next((at for at in inside if at not in seen), None)
        if state is None:
            raise UsageError(f"one of the patches {low + 1} to {high} broke it; the states between cannot be judged")
        seen[state] = good(state)
        if seen[state] is not None:
            low, high = (state, high) if seen[state] else (low, state)
    return high, list(seen)


@contextmanager
def first_patches(net: Net, patches: Sequence[Patch]) -> Iterator[None]:
    """The net with patches on it for the length of a block: added up if all are for the net as it is, else in turn."""
    with ExitStack() as stack:
        for patch in _to_apply(patches):
            stack.enter_context(patch.on(net))
        yield


def _to_apply(patches: Sequence[Patch]) -> Sequence[Patch]:
    if len(patches) < 2:
        return patches
    try:
        return [combine(patches)]
    except WrongModelError:
        return patches
