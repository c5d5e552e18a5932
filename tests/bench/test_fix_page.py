"""The page of ``fix``: what it says, what it marks, that nothing in it is markup but ours, what is refused."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from test_report import CHROMIUM, HOSTILE, Tags, opened

from lmrepair.bench.report.fix_page import fix_page, marked
from lmrepair.bench.report.fixes import read_fixes
from lmrepair.bench.report.page import write_report
from lmrepair.errors import ResultsError

COMMITTED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "fix"


def run(completion: str, kind: str = "passed", detail: str = "") -> dict[str, Any]:
    return {"completion": completion, "outcome": {"kind": kind, "detail": detail, "seconds": 0.1}}


def record(text: str = "") -> dict[str, Any]:
    """A result of fix: one repaired by a sample, one by a given solution, one kept, one broken, one out of reach."""
    share = {"tasks": 4, "before": 1, "after": 3, "difference": {"mean": 0.5, "low": 0.25, "high": 0.75}}
    tried = {"samples": 8, "passing": 2, "seconds": 1.5, "rejected": [run("nope" + text, "wrong", "line 1" + text)]}
    none = {"target": None, "tried": None, "wordings": {}, "reason": ""}
    items = [
        {
            "id": "own" + text, "prompt": "def own():\n    return" + text, "reason": "", "tried": tried,
            "before": run(" sum(a) + 1" + text, "exception", "ValueError: x" + text), "after": run(" sum(b)" + text),
            "target": {"text": " sum(b)\n" + text, "source": "sample", "nats": 3.25, "temperature": 0.6},
            "wordings": {"renamed" + text: {"before": run("1" + text, "wrong"), "after": run("2" + text)}},
        },
        {
            "id": "given", "prompt": [{"role": "user" + text, "content": "please" + text}], "reason": "",
            "before": run("x", "wrong"), "after": run("y"), "wordings": {}, "tried": {**tried, "passing": 1},
            "target": {"text": "y\n", "source": "canonical", "nats": 9.0},
        },
        {"id": "kept", "prompt": "p", "before": run("k"), "after": run("k"), **none},
        {"id": "broken", "prompt": "p", "before": run("k"), "after": run("q", "wrong", "line 2"), **none},
        {"id": "far", "prompt": "p", "before": run("", "syntax"), "after": run("", "syntax"), **none,
         "tried": tried, "reason": "out of reach" + text},
    ]  # fmt: skip
    return {
        "tasks": 5, "passing_before": 2, "in_reach": 2, "repaired": 2, "broken": 1, "passing_after": 3,
        "drift": {"kl": 0.00123, "agreement": 0.98765, "tokens": 330}, "patch": "a.safetensors" + text,
        "gate": {"kl": {"go@1" + text: 0.0001, "python@2": 0.002}},
        "cost": {"seconds": {"find" + text: 10.0, "repair": 30.0}, "forward_equivalents": 56.3, "samples": 16,
                 "neurons": 46080, "bytes": 31_300_000},
        "other_wordings": share, "held_out": {**share, "difference": {"mean": -0.25, "low": -0.5, "high": 0.0}},
        "model": "tiny" + text, "method": "minkl" + text, "sandbox": "bubblewrap" + text, "items": items,
    }  # fmt: skip


def written(path: Path, text: str = "", **more: Any) -> Path:
    path.write_text(json.dumps({**record(text), **more}), encoding="utf-8")
    return path


def said(html: str) -> str:
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", html)))


def test_the_page_says_what_the_result_says(tmp_path: Path) -> None:
    html = fix_page(read_fixes([written(tmp_path / "one.model.json")]))
    text = said(html)
    for part in (
        "lmrepair fix: one.model", "2 before, 3 after, of 5; 1 broken", "2 of 2 in reach, 1 out of reach",
        "1 own sample, 1 given solution; 16 samples taken", "KL 0.00123 nats per token, 98.77% of top tokens unchanged",
        "46,080 neurons, 31.3 MB", "own repaired", "given repaired", "kept passed before and after", "broken broken",
        "far out of reach", "✗ ValueError", "the model’s own sample at temperature 0.6, 3.2 nats; 2 passing among 8",
        "the given solution, 9.0 nats; none of 8 samples passes", "user: please", "1 completion rejected",
        "held-out tasks 4 1 3 −25.0", "reworded by rule 4 1 3 +50.0 ▲", "+25.0 to +75.0", "find 10.0 s 25%",
        "all 40.0 s 56 forward equivalents", "python 0.00200 go 0.00010",
    ):  # fmt: skip
        assert part in text, part
    assert '<mark class="gone">a</mark>' in html
    assert '<mark class="new">b</mark>' in html


@pytest.mark.parametrize(
    ("before", "after"), [("", "x"), ("a b", "a b"), (" sum(a)\n", " max(a)[0]\n"), ("ab cd\n\n e", "\tcd e.f(\x1b[3m")]
)
def test_what_is_marked_is_what_differs(before: str, after: str) -> None:
    left, right = marked(before, after)
    assert "".join(piece.text for piece in left) == before
    assert "".join(piece.text for piece in right) == after.replace("\t", "\\t").replace("\x1b", "\\x1b")
    kept = [[piece.text for piece in side if not piece.new] for side in (left, right)]
    assert kept[0] == kept[1]
    assert (before == after) == (not any(piece.new for piece in (*left, *right)))


def test_nothing_in_the_page_is_markup_but_ours(tmp_path: Path) -> None:
    plain, hostile = (fix_page(read_fixes([written(tmp_path / f"{at}.json", text)] * 2)) for at, text in
                      enumerate(("", HOSTILE)))  # fmt: skip
    marks = ("mark", "span")  # how many differ follows from how many words do
    assert [tag for tag, _ in Tags(hostile).tags if tag not in marks] == [
        tag for tag, _ in Tags(plain).tags if tag not in marks
    ]
    assert not any(name.startswith("on") for _, attributes in Tags(hostile).tags for name in attributes)
    assert "{{ 7*7 }}" in Tags(hostile).text
    assert "\x1b" not in hostile
    assert "\u202e" not in hostile
    for tag, attributes in Tags(hostile).tags:
        for name in ("src", "href", "xlink:href", "action", "style"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,")), (tag, attributes)


def test_a_folder_of_results_is_compared_model_by_model(tmp_path: Path) -> None:
    written(tmp_path / "a.json")
    written(tmp_path / "b.json", method="lora", other_wordings=None, drift=None, gate=None)
    assert write_report(tmp_path, tmp_path / "r.html") == 2
    text = said((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "a (minkl) 2 1 2 1 1 → 3 of 4 −25.0" in text
    assert "b (lora) 2 1 2 1 – −25.0" in text
    ids = [attributes["id"] for _, attributes in Tags((tmp_path / "r.html").read_text()).tags if attributes.get("id")]
    assert len(ids) == len(set(ids)) == 3


def test_one_file_is_enough_and_imports_no_model_code(tmp_path: Path) -> None:
    script = (
        "import sys; from lmrepair.bench.report import write_report; write_report(*sys.argv[1:]);"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    source = str(written(tmp_path / "one.json"))
    assert subprocess.run([sys.executable, "-c", script, source, str(tmp_path / "r.html")], check=False).returncode == 0
    first = (tmp_path / "r.html").read_bytes()
    write_report(source, tmp_path / "r.html")
    assert (tmp_path / "r.html").read_bytes() == first


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda data: data.pop("items"), "KeyError: 'items'"),
        (lambda data: data["items"][0].update(id=3), "found int, expected text"),
        (lambda data: data["cost"]["seconds"].update(find="long"), "found str, expected a number"),
        (lambda data: data["drift"].update(kl=float("nan")), "nan is no finite number"),
        (lambda data: data["items"][0]["before"].pop("outcome"), "KeyError: 'outcome'"),
    ],
)
def test_what_is_no_result_is_refused_by_name(tmp_path: Path, change: Any, complaint: str) -> None:
    data = copy.deepcopy(record())
    change(data)
    (tmp_path / "x.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ResultsError, match=re.escape(complaint)) as caught:
        write_report(tmp_path / "x.json", tmp_path / "r.html")
    assert "x.json" in str(caught.value)


def test_the_committed_page_is_made_from_the_committed_results(tmp_path: Path) -> None:
    write_report(COMMITTED, tmp_path / "r.html")
    assert (tmp_path / "r.html").read_bytes() == COMMITTED.with_suffix(".html").read_bytes()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium)")
def test_it_opens_with_the_network_off(tmp_path: Path) -> None:
    write_report(written(tmp_path / "one.json", HOSTILE), tmp_path / "r.html")
    dom, console, asked = opened(tmp_path / "r.html")
    assert "<title>lmrepair fix: one</title>" in dom
    assert console == ""
    assert asked == set()
