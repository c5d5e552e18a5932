"""TOML tables read strictly: every key has a kind, and one that nobody asked for is an error."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from lmrepair.errors import UsageError, nearest


class Table:
    """A TOML table whose keys are taken one by one; ``done`` refuses those that nobody asked for."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where, self.asked = values, where, list[str]()

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = None, needed: bool = False) -> Any:
        """The value of a key. Raises UsageError where it is missing and needed, or of another kind."""
        self.asked.append(key)
        if key not in self.values:
            if needed:
                raise UsageError(f"{self.where}: no {key}; expected {kind_name(kind)}")
            return default
        value = self.values[key]
        if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
            raise UsageError(f"{self.where}: {key} is {value!r}; expected {kind_name(kind)}")
        return value

    def text(self, key: str, default: str | None = None, choices: Sequence[str] = (), needed: bool = False) -> Any:
        value = self.take(key, str, default, needed)
        if choices and value not in choices:
            raise UsageError(f"{self.where}: {key} is {value!r}; expected one of {', '.join(choices)}")
        if value is not None and not value.strip():
            raise UsageError(f"{self.where}: {key} is empty; expected text")
        return value

    def count(self, key: str, default: int | None, least: int = 0) -> Any:
        value = self.take(key, int, default)
        if value is not None and value < least:
            raise UsageError(f"{self.where}: {key} is {value}; expected {least} or more")
        return value

    def listed(self, key: str, kind: type, default: Sequence[Any] = ()) -> list[Any]:
        values = self.take(key, list, list(default))
        for value in values:
            if not isinstance(value, kind) or isinstance(value, bool):
                raise UsageError(f"{self.where}: {key} holds {value!r}; expected a list of {kind_name(kind)}")
        if len(set(values)) < len(values):
            raise UsageError(f"{self.where}: {key} names something twice: {values}")
        return list(values)

    def tables(self, key: str, needed: bool = True) -> list[Table]:
        values = self.take(key, list, [], needed)
        if needed and not values or not all(isinstance(value, dict) for value in values):
            raise UsageError(f"{self.where}: {key} is no list of tables; expected [[{key}]] with keys below it")
        return [Table(value, f"{self.where}, {key} {number}") for number, value in enumerate(values, start=1)]

    def path(self, key: str, default: str | None = None, needed: bool = False) -> Any:
        """A relative path: a grid, and the results made from it, hold no place of one machine."""
        value = self.text(key, default, needed=needed)
        if value is not None and (PurePosixPath(value).is_absolute() or re.match(r"[A-Za-z]:|[\\~]", value)):
            raise UsageError(
                f"{self.where}: {key} is {value!r}; expected a path relative to the grid's folder, or to the "
                "folder that --models or --data names"
            )
        return value

    def done(self) -> None:
        for key in self.values:
            if key not in self.asked:
                raise UsageError(f"{self.where}: unknown key {key!r}; {nearest(key, self.asked)}")


def kind_name(kind: type | tuple[type, ...]) -> str:
    names = {
        str: "text",
        int: "a whole number",
        list: "a list",
        dict: "a table",
        bool: "true or false",
        float: "a number",
    }
    return " or ".join(names.get(one, one.__name__) for one in (kind if isinstance(kind, tuple) else (kind,)))
