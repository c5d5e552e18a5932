"""The house: rooms in the order of the pipeline, doors between them, the map, the public surface."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import lmrepair

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lmrepair"
# Rooms import only rooms above them, and inside a room modules only modules above. A new module gets its name here.
ROOMS = {
    "errors": "",
    "failures": "files sources forms rows chats tokens wordings reference protected",
    "model": "process source anatomy batches net head writing loading digests edit statistics",
    "diagnosis": "mistakes attribution drift_probe",
    "methods": "targeting maths base star minkl mint sgd finetune lora keyed direct",
    "patch": "format hub patch compose conflicts bisection disk folder serving",
    "measure": "shown intervals texts answer drift effects grid verification summary doctor",
    "loop": "gate untouched judge search case solver outcome loop alone",
    "checks": "harness sandbox tasks syntax running sampling rewording fixing",
    "bench": "toml_table grid_file standing machine cells workers run report",
    "cli": "output faults options starting patches repairing measuring demo study fix main",
    "__main__": "",
}
INSIDE = {  # a room in a room: its parent's modules above it are its own, and its parent comes in by the door
    "model.anatomy": "shards stacks products gathered mixtures probe norm projections places",
    "model.edit": "sparse_integers products changes trial unwritten",
    "model.loading": "cutting checkpoint consent header gguf_file opening",
    "model.statistics": "cache moments texts packing sums joining gathering",
    "methods.maths": "optimiser basis closed_form direct_path spans tail margins dual linearised",
    "methods.keyed": "values keyed rome memit",
    "patch.disk": "stored placing experts others copies writing source",
    "patch.serving": "factors choice peft gguf engines",
    "measure.doctor": "memory products tokenizer estimate engines examined",
    "cli.patches": "common folders parts serve served trouble hub",
    "cli.faults": "verdicts memory",
    "cli.output": "console clock bars render render_measures render_doctor",
    "cli.fix": "outcomes commands",
    "bench.cells": "in_turn records inputs cell",
    "bench.report": "results figures tables plots sheet fixes fix_page page",
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


@cache
def order() -> list[str]:
    """Every module in its place; a room's door stands behind its modules."""
    found = []
    for room, modules in ROOMS.items():
        for module in modules.split():
            inner = INSIDE.get(f"{room}.{module}")
            found += [f"{room}.{module}.{part}" for part in (inner or "").split()] + [f"{room}.{module}"]
        found.append(room)
    return found


def room_of(module: str) -> str:
    inner = [room for room in INSIDE if module == room or module.startswith(room + ".")]
    return inner[0] if inner else module.split(".")[0]


@cache
def parsed(path: Path) -> tuple[str, ast.Module]:
    text = path.read_text(encoding="utf-8")
    return text, ast.parse(text)


@cache
def imports(path: Path) -> list[tuple[int, str, list[str]]]:
    found = [node for node in ast.walk(parsed(path)[1]) if isinstance(node, ast.ImportFrom)]
    mine = [node for node in found if (node.module or "").split(".")[0] == "lmrepair"]
    return [(node.lineno, (node.module or "")[9:], [alias.name for alias in node.names]) for node in mine]


def test_every_module_has_its_place() -> None:
    assert sorted(order()) == sorted(map(name_of, FILES))
    for modules in (*ROOMS.values(), *INSIDE.values()):
        assert len(modules.split()) <= 11
        assert sum(f".{name}" not in "".join(INSIDE) for name in modules.split()) <= 9, modules
    entries = [path.name for path in PACKAGE.iterdir() if not path.name.startswith("__") and path.name != "py.typed"]
    assert len(entries) - 1 <= 10, f"beside errors.py: {sorted(entries)}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_module_imports_what_stands_above_it_and_other_rooms_by_the_door(path: Path) -> None:
    me, places = name_of(path), order()
    for line, module, names in imports(path):
        if not module:
            assert names == ["door"], f"line {line}: import from the rooms, not from the package"
            continue
        assert module in places, f"line {line}: {module}"
        if path.name == "__init__.py" and module.startswith(me + "."):
            continue
        assert places.index(module) < places.index(me), f"line {line}: {module} stands below"
        other, mine = room_of(module), room_of(me)
        family = other == mine or mine.startswith(other + ".")
        assert family or module == other, f"line {line}: {module} is inside another room; use lmrepair.{other}"


@pytest.mark.parametrize("room", [*(room for room, modules in ROOMS.items() if modules), *INSIDE])
def test_a_door_says_what_for_and_gives_what_it_lists(room: str) -> None:
    path = PACKAGE / Path(*room.split(".")) / "__init__.py"
    summary = (ast.get_docstring(parsed(path)[1]) or "").splitlines()[0]
    assert summary.endswith(".")
    given = [name for _, module, names in imports(path) if module.startswith(room + ".") for name in names]
    assert given
    modules = {module.rpartition(".")[2] for module in order() if module.startswith(room + ".")}
    # A name that is also a module's would give the one or the other, by what was imported first.
    assert room == "cli" or not set(given) & modules
    door = __import__(f"lmrepair.{room}", fromlist=["*"])
    for name in given:
        assert getattr(door, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_the_kind'"):
        _ = door.nothing_of_the_kind


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_shortcuts(path: Path) -> None:
    text, tree = parsed(path)
    assert not re.search(r"except Exception|except:|except BaseException:\s*pass|pickle|(?<![.\w])(eval|exec)\(", text)
    if name_of(path) != "cli.main":
        assert not re.search(r"^\s*print\(", text, re.MULTILINE)
    assert len(text.splitlines()) <= 350
    assert ast.get_docstring(tree)


def test_the_public_surface_is_the_list() -> None:
    listed = [name for _, _, names in imports(PACKAGE / "__init__.py") for name in names]
    assert sorted(listed) == sorted(set(listed)) == lmrepair.__all__ == dir(lmrepair)
    for name in lmrepair.__all__:
        assert getattr(lmrepair, name).__doc__, name
    assert {"load", "read_failures", "repair", "Patch", "evaluate", "Star"} <= set(lmrepair.__all__)
    with pytest.raises(AttributeError, match="no attribute 'repare'"):
        _ = lmrepair.repare


def test_importing_the_package_and_its_methods_does_not_import_torch() -> None:
    script = (
        "import sys, lmrepair, lmrepair.methods, lmrepair.cli, lmrepair.bench.report;"
        "from lmrepair.bench import bench, plan; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_maps_are_the_tree() -> None:
    """The README names the rooms; docs/architecture.md every module."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").split("## Map")[1].split("\n## ")[0]
    named = set(re.findall(r"^\| `([^`]+)`", readme, re.MULTILINE))
    for place in named:
        assert (ROOT / place).exists(), f"{place} is on the map and not in the tree"
    rooms = {f"lmrepair/{room}/" for room, modules in ROOMS.items() if modules}
    assert {place for place in named if place.startswith("lmrepair/")} == rooms | {"lmrepair/errors.py"}
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in FILES:
        if not path.name.startswith("__"):
            assert f"`{path.name}`" in page or f"`{path.stem}`" in page, (
                f"{name_of(path)} is not in docs/architecture.md"
            )


def test_what_the_readme_links_to_exists() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_what_ships_is_small_and_complete() -> None:
    embedded = PACKAGE / "model" / "embedded"
    assert sum(path.stat().st_size for path in embedded.rglob("*") if path.is_file()) <= 12_000_000
    assert {path.name for path in embedded.iterdir()} >= {"model", "README.md", "failures.jsonl", "reference.jsonl"}
    assert {path.name for path in (embedded / "model").iterdir()} >= {"config.json", "tokenizer.json", "training.json"}
