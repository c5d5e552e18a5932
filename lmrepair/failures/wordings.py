"""Other prompts than the failures' own: with the same target, and with something else to answer in the same form.

The first are solved together with a failure, so that its repair carries over; the second are to stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lmrepair.errors import FailuresError
from lmrepair.failures.rows import Failure
from lmrepair.failures.tokens import Tokens

SYSTEM = ("system", "developer")  # whose turns say how the chat goes, not what is asked
REQUESTS = (
    "list all files in a folder",
    "reverse the order of the words in a sentence",
    "which sea lies north of Poland?",
    "read a file line by line",
    "multiply the value in a register by two",
    "explain how photosynthesis works",
    "remove duplicates from a list, keeping the order",
    "copy a directory to another machine",
    "convert a string to lower case",
    "write a short poem about the sea",
    "show the ten largest files",
    "connect to a database and run a query",
    "who painted the Mona Lisa?",
    "replace every tab with four spaces",
    "jump to a label if the flag is set",
    "find the index of the largest element",
    "create a new branch and switch to it",
    'translate "thank you" into Italian',
    "check whether a number is prime",
    "send a POST request with a JSON body",
    "compress a folder into an archive",
    "how do I boil an egg?",
    "store the result at an address in memory",
    "open a web page in the browser",
    "group rows by a column and sum the values",
    "name the longest river in Africa",
    "delete a user account",
    "count the words in a document",
    "pick a random element from a list",
    "write an e-mail that asks for a day off",
    "start a process in the background",
    "draw a line chart of two columns",
)


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


def kindred(failures: Sequence[Failure]) -> list[Failure]:
    """REQUESTS in the place of the failures' own, without an answer; the forms of several failures take turns.

    Of a chat its system turns, tools and settings stay. None for prompts that are neither a chat nor under a template.
    """
    forms: list[Failure] = []
    for failure in failures:
        form = _form(failure)
        if form is not None and (form.template, form) not in [(one.template, one) for one in forms]:
            forms.append(form)
    return [_asked(forms[at % len(forms)], text) for at, text in enumerate(REQUESTS) if forms]


def _form(failure: Failure) -> Failure | None:
    """What is left of a failure without what it asks and answers."""
    kept = replace(failure, prompt="", target="", id="", paraphrases=(), turn=None)
    if failure.messages:
        return replace(kept, messages=tuple(turn for turn in failure.messages if turn.get("role") in SYSTEM))
    return kept if failure.template is not None and failure.template.prompt("") else None


def _asked(form: Failure, request: str) -> Failure:
    if form.template is not None:
        return replace(form, prompt=form.template.prompt(request), id=request)
    return replace(form, messages=(*form.messages, {"role": "user", "content": request}), id=request)
