"""The house: import order is the pipeline, the README's map is the tree, the public surface is a list."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lmrepair

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lmrepair"
# Each module imports only modules above it. A new module gets a line here.
ORDER = [
    "errors",
    "files",
    "failures",
    "targeting",
    "tomltable",
    "anatomy",
    "net",
    "wordings",
    "loading",
    "fingerprint",
    "trial",
    "patchfile",
    "patch",
    "basis",
    "tail",
    "margins",
    "dual",
    "moments",
    "closed_form",
    "direct_path",
    "diagnosis",
    "locate",
    "methods.base",
    "methods.star",
    "methods.minkl",
    "methods.mint",
    "methods.sgd",
    "methods.adam",
    "methods.values",
    "methods.keyed",
    "methods.rome",
    "methods.memit",
    "methods.direct",
    "methods.finetune",
    "methods.lora",
    "methods",
    "drift",
    "gate",
    "guard",
    "gating",
    "statistics",
    "solver",
    "outcome",
    "loop",
    "verify",
    "saved",
    "metrics",
    "evaluation",
    "sideeffects",
    "grid",
    "cumulative",
    "measures",
    "render",
    "render_measures",
    "gridfile",
    "machine",
    "records",
    "cell",
    "workers",
    "bench",
    "report.results",
    "report.figures",
    "report.tables",
    "report.plots",
    "report.page",
    "report",
    "alone",
    "demo",
    "options",
    "studies",
    "bars",
    "cli",
    "__main__",
]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def test_every_module_has_its_place() -> None:
    assert sorted(ORDER) == sorted(map(name_of, MODULES))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_modules_above_it(path: Path) -> None:
    above = set(ORDER[: ORDER.index(name_of(path))])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "lmrepair" for alias in node.names), "use from-imports"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lmrepair":
            module = (node.module or "").removeprefix("lmrepair").lstrip(".")
            found = {module} if module else {alias.name for alias in node.names}
            # render names later modules' types in annotations only.
            if name_of(path) != "render":
                assert found <= above, f"line {node.lineno}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_shortcuts(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"except Exception|except:|except BaseException:\s*pass|pickle|(?<![.\w])(eval|exec)\(", text)
    if name_of(path) not in ("cli",):
        assert not re.search(r"^\s*print\(", text, re.MULTILINE)
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text))


def test_the_public_surface_is_the_list() -> None:
    assert sorted(lmrepair._MODULES) == sorted(lmrepair.__all__)
    for name in lmrepair.__all__:
        found = getattr(lmrepair, name)
        assert found.__doc__, name
        assert found.__module__ == f"lmrepair.{lmrepair._MODULES[name]}" or found.__module__.startswith(
            "lmrepair.methods"
        )
    assert {"load", "read_failures", "repair", "Patch", "evaluate", "Star"} <= set(lmrepair.__all__)
    with pytest.raises(AttributeError, match="no attribute 'repare'"):
        _ = lmrepair.repare


def test_importing_the_package_and_its_methods_does_not_import_torch() -> None:
    script = "import sys, lmrepair, lmrepair.methods, lmrepair.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_readmes_map_is_the_tree() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("## Map")[1].split("## ")[0]
    named = set(re.findall(r"^\| `([^`]+)`", table, re.MULTILINE))
    for place in named:
        assert (ROOT / place).exists(), f"{place} is on the map and not in the tree"
    modules = {f"lmrepair/{path.name}" for path in PACKAGE.glob("*.py") if not path.name.startswith("__")}
    folders = {f"lmrepair/{path.name}/" for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert {place for place in named if place.startswith("lmrepair/")} == modules | folders


def test_what_the_readme_links_to_exists() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_what_ships_is_small_and_complete() -> None:
    embedded = PACKAGE / "embedded"
    assert sum(path.stat().st_size for path in embedded.rglob("*") if path.is_file()) <= 12_000_000
    assert {path.name for path in embedded.iterdir()} >= {"model", "README.md", "failures.jsonl", "reference.jsonl"}
    assert {path.name for path in (embedded / "model").iterdir()} >= {"config.json", "tokenizer.json", "training.json"}


def test_the_demo_shows_what_it_promises(capsys: pytest.CaptureFixture[str]) -> None:
    from lmrepair.demo import run_demo

    lines: list[str] = []
    data = run_demo("cpu", lines.append)
    assert data["repaired"] == data["failing"] >= 5
    assert data["verified"] is True
    assert data["restored"] is True
    assert data["wordings"]["right_after"] > data["wordings"]["right_before"]
    assert data["neighbours"]["unchanged"] >= data["neighbours"]["count"] / 2
    assert "taken back      bit for bit" in lines
    assert capsys.readouterr().out == ""
