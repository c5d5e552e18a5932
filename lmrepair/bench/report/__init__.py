"""The report of a bench: one page from a folder of JSON. Imports no model code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmrepair import door

if TYPE_CHECKING:
    from lmrepair.bench.report.page import write_report as write_report

__getattr__, __dir__ = door(__name__)
