"""Checks that are not tests: patterns that must not be in the syntax tree, commands that must be content."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from lmrepair.errors import UsageError


@dataclass(frozen=True)
class Forbidden:
    """A piece of Python that must not occur. ``...`` stands for any expression, as the only argument for any
    arguments; a name stands for itself, so that ``yaml.load(...)`` is that call however it is written or spaced.
    A call also matches through what the code imports: ``from yaml import load as read`` makes ``read(x)`` one.
    """

    text: str
    pattern: ast.AST

    @classmethod
    def parse(cls, text: str) -> Forbidden:
        """Read a pattern. Raises UsageError for what is not one Python expression or statement."""
        try:
            body = ast.parse(text.strip()).body
        except (SyntaxError, ValueError) as error:
            raise UsageError(
                f"--forbid {text!r}: not Python ({error}); expected code as in 'yaml.load(...)'"
            ) from error
        if len(body) != 1:
            raise UsageError(f"--forbid {text!r}: {len(body)} statements; expected one, as in 'yaml.load(...)'")
        (node,) = body
        return cls(text, node.value if isinstance(node, ast.Expr) else node)

    def lines(self, tree: ast.AST) -> Iterator[int]:
        """The lines of a program's tree on which it occurs."""
        names = _imported(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.stmt | ast.expr) and _same(self.pattern, node, names):
                yield node.lineno


def forbidden(tree: ast.AST, patterns: tuple[Forbidden, ...]) -> str:
    """The first forbidden pattern in a tree, with its line; empty if there is none."""
    found = [(line, pattern.text) for pattern in patterns for line in pattern.lines(tree)]
    return f"line {min(found)[0]}: {min(found)[1]}" if found else ""


def _imported(tree: ast.AST) -> dict[str, str]:
    """Name in the program → dotted name that it was imported as."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return found


def _dotted(node: ast.AST, names: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        head = _dotted(node.value, names)
        return f"{head}.{node.attr}" if head else ""
    return ""


def _same(pattern: object, node: object, names: dict[str, str]) -> bool:
    if isinstance(pattern, ast.Constant) and pattern.value is ...:
        return isinstance(node, ast.expr)
    if isinstance(pattern, ast.Name | ast.Attribute) and isinstance(node, ast.Name | ast.Attribute):
        wanted = _dotted(pattern, {})
        if wanted:
            return wanted == _dotted(node, names)
    if isinstance(pattern, ast.Call) and isinstance(node, ast.Call):
        everything = len(pattern.args) == 1 and not pattern.keywords and _is_any(pattern.args[0])
        if everything:
            return _same(pattern.func, node.func, names)
    if isinstance(pattern, ast.AST):
        if type(pattern) is not type(node):
            return False
        fields = [name for name in pattern._fields if name not in ("ctx", "kind", "type_comment", "type_params")]
        return all(_same(getattr(pattern, name, None), getattr(node, name, None), names) for name in fields)
    if isinstance(pattern, list):
        if len(pattern) == 1 and isinstance(pattern[0], ast.Expr) and _is_any(pattern[0].value):
            return isinstance(node, list)
        if not isinstance(node, list) or len(pattern) != len(node):
            return False
        return all(_same(one, other, names) for one, other in zip(pattern, node, strict=True))
    return type(pattern) is type(node) and pattern == node


def _is_any(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...
