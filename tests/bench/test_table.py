"""The README's table of methods on real models says what the committed results say."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = {("gemma-3-270m", "star paper"), ("gemma-3-270m", "sgd paper")}


def test_the_readmes_figures_are_the_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    table = __import__("summary_table")
    table.main(str(ROOT / "benchmarks" / "results" / "real"), "conala")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == 20
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for model, method, repaired, cost, kl, own, *wordings, _ in rows:
        if (model, method) not in LEFT_OUT:
            shown = (repaired, cost, kl, own, *(value.removeprefix("0") for value in wordings))
            assert f" | {' | '.join(shown)} | " in readme, (model, method)
