"""Where the time of a command goes."""

from __future__ import annotations

import json

import pytest
from command import Run, write

from lmrepair.cli.output import clock as module
from lmrepair.cli.output.clock import Clock, timings_text


def test_parts_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 2.0, 10.0, 11.0, 11.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(now))
    clock = Clock()
    clock.part("importing")
    clock.part("other", {"solving": 5.0, "gate": 1.0})
    clock.part("reading options")
    parts = clock.parts()
    assert parts == {"importing": 2.0, "solving": 5.0, "gate": 1.0, "other": 3.0, "whole": 11.0}
    assert [line.split() for line in timings_text(parts)[1:3]] == [
        ["importing", "2.00", "s", "18.2%"],
        ["solving", "5.00", "s", "45.5%"],
    ]


def test_repair_tells_its_timings(run: Run, tmp_path: object) -> None:
    from pathlib import Path

    write(Path("one.jsonl"), {"prompt": "import datetime\n\nnow = ", "target": "clock.read()\n"})
    code, out, _ = run("repair", "one.jsonl", "--layers", "last", "--max-kl", "inf", "--timings")
    assert code == 0
    names = [line.split()[0] for line in out.splitlines()[-11:]]
    assert names == [*module.ORDER, "whole"]
    parts = json.loads(run("repair", "one.jsonl", "--layers", "last", "--max-kl", "inf", "--json")[1])["timings"]
    assert parts["whole"] == pytest.approx(sum(parts.values()) - parts["whole"], rel=0.02)
    assert min(parts.values()) >= 0
