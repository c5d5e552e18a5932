"""Other prompts that want the same target, solved together with a failure so that its repair carries over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lmrepair.errors import FailuresError, UsageError
from lmrepair.failures import Failure, Tokens
from lmrepair.net import Net, settled

LENGTH = 12  # tokens of a text that is put before a prompt


@dataclass(frozen=True)
class Wordings:
    """Which other prompts take part in a solve: the failures' own ``paraphrases``, and each prompt with every
    one of the texts ``before`` it (prompts that are chats are left as they are).
    """

    paraphrases: bool = False
    before: tuple[str, ...] = ()

    @staticmethod
    def drawn(net: Net, paraphrases: bool, prefixes: int, seed: int = 0) -> Wordings:
        """With ``prefixes`` texts that the model writes by itself (after MEMIT, arXiv 2210.07229)."""
        if prefixes < 0:
            raise UsageError(f"prefixes is {prefixes}; expected a number of texts, 0 or more")
        if not prefixes:
            return Wordings(paraphrases)
        with settled(net.model):
            written = net.sample(prefixes, LENGTH, seed)
        texts = (str(net.tokenizer.decode(list(item.target), skip_special_tokens=True)) for item in written)
        return Wordings(paraphrases, tuple(text.rstrip() + "\n" for text in texts))

    def of(self, net: Net, failures: Sequence[Failure]) -> list[Tokens]:
        """The other prompts of some failures; those that the model has no room for are left out."""
        found: list[Tokens] = []
        for failure in failures:
            texts = [text for text in failure.paraphrases if text != failure.asked] if self.paraphrases else []
            if not failure.messages:
                texts += [lead + failure.prompt for lead in self.before]
            for number, text in enumerate(texts):
                worded = replace(failure.asking(text), id=f"{failure.id}.{number}", paraphrases=())
                try:
                    found += net.tokenize([worded])
                except FailuresError:
                    continue
        return found

    def data(self) -> dict[str, int | bool]:
        """What a patch records of them."""
        return {"paraphrases": self.paraphrases, "prefixes": len(self.before)}
