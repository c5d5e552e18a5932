"""The command line: each command parses, calls one function, prints."""

from __future__ import annotations

from lmrepair.cli.main import main as main
