"""Forbidden code is found in the tree, not in the text."""

from __future__ import annotations

import ast

import pytest

from lmrepair.checks import Forbidden, forbidden
from lmrepair.errors import UsageError


@pytest.mark.parametrize(
    ("pattern", "code", "line"),
    [
        ("yaml.load(...)", "import yaml\nyaml.load(text)", 2),
        ("yaml.load(...)", "import yaml\nx = yaml . load(\n  text, Loader=yaml.Loader)", 2),
        ("yaml.load(...)", "from yaml import load as read\nread(text)", 2),
        ("yaml.load(...)", "import yaml as y\ny.load(text)", 2),
        ("yaml.load(...)", "yaml.safe_load(text)  # not yaml.load(text)", 0),
        ("yaml.load(...)", "'yaml.load(text)'", 0),
        ("yaml.load(...)", "mine.yaml.load(text)", 0),
        ("eval(...)", "f(eval('1'))", 1),
        ("os.system", "import os\nrun = os.system", 2),
        ("subprocess.run(..., shell=True)", "import subprocess\nsubprocess.run(x, shell=True)", 2),
        ("subprocess.run(..., shell=True)", "import subprocess\nsubprocess.run(x, shell=False)", 0),
        ("... == None", "if x == None: pass", 1),
        ("... == None", "if x is None: pass", 0),
        ("global x", "def f():\n    global x", 2),
        ("print('a')", "print('b')", 0),
    ],
)
def test_patterns(pattern: str, code: str, line: int) -> None:
    found = forbidden(ast.parse(code), (Forbidden.parse(pattern),))
    assert found == (f"line {line}: {pattern}" if line else "")


@pytest.mark.parametrize("text", ["yaml.load(", "a; b", ""])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected"):
        Forbidden.parse(text)
