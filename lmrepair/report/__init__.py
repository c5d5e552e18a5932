"""The report of a bench: one page from a folder of JSON. Imports no model code."""

from __future__ import annotations

from lmrepair.report.page import write_report

__all__ = ["write_report"]
