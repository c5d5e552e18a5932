"""Keep track of what is on which shelf."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Inventory:
    shelves: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, shelf: str, item: str, count: int = 1) -> None:
        if count < 1:
            raise ValueError(f"count must be positive, not {count}")
        self.shelves.setdefault(shelf, Counter())[item] += count

    def where(self, item: str) -> list[str]:
        return sorted(name for name, items in self.shelves.items() if items[item] > 0)

    @classmethod
    def load(cls, path: Path) -> Inventory:
        inventory = cls()
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                inventory.add(row["shelf"], row["item"], int(row["count"]))
        return inventory
