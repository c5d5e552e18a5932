"""Other prompts that want the same target, solved together with a failure so that its repair carries over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lmrepair.errors import FailuresError
from lmrepair.failures.rows import Failure
from lmrepair.failures.tokens import Tokens


@dataclass(frozen=True)
class Wordings:
    """Which other prompts take part in a solve: the failures' own ``paraphrases``, and each prompt with every
    one of the texts ``before`` it (prompts that are chats are left as they are).
    """

    paraphrases: bool = False
    before: tuple[str, ...] = ()

    def of(self, failures: Sequence[Failure], tokenize: Callable[[Sequence[Failure]], list[Tokens]]) -> list[Tokens]:
        """The other prompts of some failures as ``tokenize`` reads them; those it refuses (no room) are left out."""
        found: list[Tokens] = []
        for failure in failures:
            others = failure.otherwise() if self.paraphrases else []
            if not failure.messages:
                others += [replace(failure.asking(lead + failure.prompt), paraphrases=()) for lead in self.before]
            for number, other in enumerate(others):
                try:
                    found += tokenize([replace(other, id=f"{failure.id}.{number}")])
                except FailuresError:
                    continue
        return found

    def data(self) -> dict[str, int | bool]:
        """What a patch records of them."""
        return {"paraphrases": self.paraphrases, "prefixes": len(self.before)}
