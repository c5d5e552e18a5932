"""Read failures: rows in the field's forms, chats, tokens with the true boundary, other wordings, what must stay."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmrepair import door

if TYPE_CHECKING:
    from lmrepair.failures.chats import end_of_turn as end_of_turn
    from lmrepair.failures.files import (
        flush as flush,
        shipped as shipped,
        umask as umask,
        write_atomically as write_atomically,
    )
    from lmrepair.failures.forms import Template as Template
    from lmrepair.failures.protected import (
        ANSWER as ANSWER,
        MAX_KL as MAX_KL,
        Protected as Protected,
        read_protected as read_protected,
    )
    from lmrepair.failures.reference import (
        Reference as Reference,
        named as named,
        read_kept as read_kept,
        read_kinds as read_kinds,
        read_reference as read_reference,
    )
    from lmrepair.failures.rows import (
        Failure as Failure,
        contradictions as contradictions,
        listed as listed,
        read_failures as read_failures,
    )
    from lmrepair.failures.sources import STANDARD_INPUT as STANDARD_INPUT, read_lines as read_lines
    from lmrepair.failures.tokens import Tokens as Tokens, prompt_ids as prompt_ids, tokenize as tokenize
    from lmrepair.failures.wordings import Wordings as Wordings, kindred as kindred

__getattr__, __dir__ = door(__name__)
