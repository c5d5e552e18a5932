"""The commands that execute: what they print, and what they call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmrepair import door

if TYPE_CHECKING:
    from lmrepair.cli.fix.commands import check as check, fix as fix

__getattr__, __dir__ = door(__name__)
