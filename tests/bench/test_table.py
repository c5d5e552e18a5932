"""The tables of methods on real models, on their page and in the README, say what the committed results say."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAIN = ("minkl", "star", "finetune")
LEFT_OUT = {("gemma-3-270m", "star paper"), ("gemma-3-270m", "sgd paper")}


@pytest.mark.parametrize(("task", "count"), [("conala", 22), ("conala chat", 3), ("ia32", 6), ("tldr", 6)])
def test_the_pages_figures_are_the_results(
    task: str, count: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    table = __import__("summary_table")
    table.main(str(ROOT / "benchmarks" / "results" / "real"), task)
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()[2:]]
    rows = [row for row in found if (row[0], row[1]) not in LEFT_OUT and (task == "conala" or row[1] in MAIN)]
    assert len(rows) == count
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for model, method, repaired, cost, kl, own, *wordings, _ in rows:
        shown = " | ".join((repaired, cost, kl, own, *(value.removeprefix("0") for value in wordings)))
        assert f" | {shown.replace('|  |', '| |')} | " in page, (model, method)


def test_the_readme_shows_rows_of_the_page() -> None:
    page, readme = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/results.md", "README.md"))
    shown = readme.split("| model | method |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(shown) == 8
    figures = [row.split("|", 3)[3] for row in page.splitlines() if row.startswith("| ")]
    assert all(row.split("|", 3)[3] in figures for row in shown)
