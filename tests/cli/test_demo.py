"""The demo keeps its promises."""

from __future__ import annotations

import pytest


def test_the_demo_shows_what_it_promises(capsys: pytest.CaptureFixture[str]) -> None:
    from lmrepair.cli.demo import run_demo

    lines: list[str] = []
    data = run_demo("cpu", lines.append)
    assert data["repaired"] == data["failing"] >= 5
    assert data["verified"] is True
    assert data["restored"] is True
    assert data["wordings"]["right_after"] > data["wordings"]["right_before"]
    assert data["neighbours"]["unchanged"] >= data["neighbours"]["count"] / 2
    assert "taken back      bit for bit" in lines
    assert capsys.readouterr().out == ""
