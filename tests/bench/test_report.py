"""The report: what it says, that nothing in it is markup but ours, and that it opens with the network off."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmrepair.bench.report.figures import Group, difference, ratio_of_means, times
from lmrepair.bench.report.page import page, write_report
from lmrepair.bench.report.results import read_results
from lmrepair.errors import ResultsError, UsageError

HOSTILE = "</style><script>document.title='run'</script><img src=x onerror=alert(1)> {{ 7*7 }} \x1b[31m \u202e"
METHODS = {"star": "star", "sgd paper": "sgd", "mint paper": "mint", "$a_b$ <b>": "finetune"}
CHROMIUM = shutil.which("chromium")


def answer(mistakes: list[list[Any]], tokens: int) -> dict[str, Any]:
    match = 1 - len(mistakes) / tokens
    scores = {"exact": not mistakes, "bleu": match, "rouge_l": match, "edit_similarity": match}
    return {"mistakes": mistakes, "teacher": {"token_match": match, **scores}, "greedy": scores}


def failure(number: int, method: str, text: str) -> dict[str, Any]:
    worse = {"star": 0, "sgd": 1, "mint": 2, "finetune": 0}[method]
    after = [[at, 9, "said" + text] for at in range(min(worse, number % 3))]
    effect = {"change": {"match": 0.1, "gap": 0.2}, "unchanged": 0.9, "unchanged_texts": None}
    return {
        "id": f"{number}{text}", "prompt": f"prompt {number} {text}", "target": "a b c" + text,
        "tokens": [[1, "a"], [2, " b"], [3, " c\n" + text]], "repaired": not after, "reason": "",
        "before": answer([[0, 5, "x"], [2, 6, text or "y"]], 3), "after": answer(after, 3),
        "cost": {"seconds": (1 + worse) * (1 + number / 10), "forward_equivalents": 10.0, "peak_memory": None},
        "patch": {"layers": 1, "neurons": 5, "parameters": 50, "bytes": 1000},
        "drift": {"python": {"kl": 0.001 * (1 + number), "agreement": 0.99, "perplexity_after": 8.0}},
        "heldout": {"change": {"token_match": 0.0, "exact_match": 0.0, "bleu": 0.01}},
        "generalisation": {"paraphrases": effect}, "specificity": effect,
    }  # fmt: skip


def cell(study: str, name: str, text: str = "", **more: Any) -> dict[str, Any]:
    base = METHODS[name]
    targeting = more.pop("targeting", {})
    return {
        "format": 1, "name": f"{study}.{name}.{targeting}", "grid": "tests" + text, "order": 0, "status": "done",
        "error": None, "seconds": 1.0, "machine": {"processor": "p", "threads": 1, "device": "cpu"},
        "versions": {"lmrepair": "0"}, "failures": [failure(at, base, text) for at in range(6)],
        "config": {
            "study": study, "seed": 0, "targeting": targeting, "model": {"name": "tiny"}, "data": {"name": "task"},
            "method": {"name": name, "method": base, "preset": None, "settings": {"share": "1", **targeting}},
        },
        **more,
    }  # fmt: skip


def written(folder: Path, text: str = "") -> Path:
    folder.mkdir()
    cells = [cell("alone", name, text) for name in METHODS]
    cells += [
        cell("sparsity", "star", text, targeting={"layers": a, "share": b})
        for a in ("one", "1", "upper 1/2", "last")
        for b in ("1/4", "1")
    ]
    curve = [{"k": k, "holding": 1 - k / 10, "right": 1.0, "repaired": k, "heldout": {"token_match": 0.5},
              "drift": {"python": {"kl": k / 100}}} for k in (0, 2, 4)]  # fmt: skip
    cells.append(cell("cumulative", "star", text, curve=curve, joint=curve[-1]))
    cells.append(cell("together", "star", text, together={"cost": {"seconds": 2.0}, "patch": {"neurons": 7}}))
    error = {"type": "ModelError", "message": "no weights " + text, "at": ""}
    cells.append({**cell("grid", "star", text), "status": "failed", "error": error, "failures": []})
    for number, one in enumerate(cells):
        (folder / f"{number}.json").write_text(json.dumps({**one, "order": number}), encoding="utf-8")
    return folder


class Tags(HTMLParser):
    """Every tag with its attributes, and the text outside of style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_says_what_the_results_say(tmp_path: Path) -> None:
    assert write_report(written(tmp_path / "r"), tmp_path / "r.html") == len(METHODS) + 11
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    said = Tags(text).text
    for title in ("Effectiveness", "Efficiency", "Side effects", "Sparsity", "Overfitting risk", "Cumulative impact"):
        assert title in said
    assert "ModelError: no weights" in said
    rows = {row.id: row for row in read_results(tmp_path / "r")[1].rows}
    mean = 100 * np.mean([row.values["after.teacher.token_match"] for row in rows.values()])
    table = text.split('aria-label="Under teacher forcing')[1].split("</table>")[0]
    line = table.split('<th scope="row">sgd paper</th>')[1].split("</tr>")[0]
    assert f"{mean:.1f}<small>" in line
    marked = re.findall(
        r'<mark title="wanted ([^"]*)">([^<]*)</mark>', text.split("prompt 2")[1].split("</details>")[0]
    )
    assert marked[:2] == [("a", "x"), ("·c⏎", "y")]
    assert ("a", "said") in marked[2:]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A folder of results, the page that another process makes of them, and which model code it has imported."""
    folder = tmp_path_factory.mktemp("elsewhere")
    script = (
        "import sys; from lmrepair.bench.report import write_report; write_report(*sys.argv[1:]);"
        "print(*{'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(written(folder / "r")), str(folder / "r.html")],
        env={**os.environ, "PYTHONHASHSEED": "7"}, check=True, stdout=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip
    return folder / "r", (folder / "r.html").read_text(encoding="utf-8"), done.stdout


@pytest.fixture(scope="module")
def plain(elsewhere: tuple[Path, str, str]) -> str:
    """The page of the same results, made here."""
    return page(read_results(elsewhere[0]))


def test_the_same_results_give_the_same_page(elsewhere: tuple[Path, str, str], plain: str) -> None:
    first = plain
    assert elsewhere[1] == first
    ids = [attributes["id"] for _, attributes in Tags(first).tags if attributes.get("id")]
    assert len(ids) == len(set(ids))


def test_nothing_in_the_page_is_markup_but_ours(plain: str, tmp_path: Path) -> None:
    hostile = page(read_results(written(tmp_path / "b", HOSTILE)))
    assert [tag for tag, _ in Tags(hostile).tags] == [tag for tag, _ in Tags(plain).tags]
    assert "script" not in {tag for tag, _ in Tags(hostile).tags}
    assert not any(name.startswith("on") for _, attributes in Tags(hostile).tags for name in attributes)
    assert "{{ 7*7 }}" in Tags(hostile).text
    assert "\x1b" not in hostile
    assert "\u202e" not in hostile
    for tag, attributes in Tags(hostile).tags:
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,")), (tag, attributes)


def test_the_report_imports_no_model_code(elsewhere: tuple[Path, str, str]) -> None:
    assert elsewhere[2] == "\n"


def test_paired_figures_are_numpys(tmp_path: Path) -> None:
    star, sgd = (Group(result.method, (result,)) for result in read_results(written(tmp_path / "r"))[:2])
    mine, theirs = (np.array(list(group.values("cost.seconds").values())) for group in (star, sgd))
    ratio, gain = times(sgd, star, "cost.seconds"), ratio_of_means(star, sgd, "after.teacher.token_match")
    points = difference(star, sgd, "after.teacher.token_match")
    assert ratio is not None
    assert gain is not None
    assert points is not None
    assert ratio.mean == pytest.approx(np.exp(np.log(theirs / mine).mean()))
    assert ratio.low == pytest.approx(ratio.high) == pytest.approx(2.0)
    a, b = (np.array(list(group.values("after.teacher.token_match").values())) for group in (star, sgd))
    assert points.mean == pytest.approx((a - b).mean())
    assert points.low <= points.mean <= points.high
    assert gain.mean == pytest.approx(a.mean() / b.mean() - 1)
    assert gain.low < gain.mean < gain.high


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"format": 2}', "format 2, this version reads 1"),
        ('{"format": 1}', "KeyError: 'config'"),
    ],
)
def test_what_is_no_cell_is_refused_by_name(tmp_path: Path, content: str, said: str) -> None:
    folder = written(tmp_path / "r")
    (folder / "x.json").write_text(content, encoding="utf-8")
    with pytest.raises(ResultsError, match=re.escape(said)) as caught:
        read_results(folder)
    assert "x.json" in str(caught.value)


def test_a_mistake_outside_the_target_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "r")
    record = json.loads((folder / "0.json").read_text(encoding="utf-8"))
    record["failures"][0]["after"]["mistakes"] = [[3, 1, "x"]]
    (folder / "0.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ResultsError, match="a mistake outside the target"):
        read_results(folder)


def test_places_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="no such folder"):
        write_report(tmp_path / "none", tmp_path / "r.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ResultsError, match="no results in it"):
        write_report(tmp_path / "empty", tmp_path / "r.html")
    with pytest.raises(UsageError, match="is a folder"):
        write_report(written(tmp_path / "r"), tmp_path)


def opened(path: Path) -> tuple[str, str, set[str]]:
    """A page opened in Chromium: its DOM, the console, and the addresses that the page (not the browser) asked for."""
    log = path.with_suffix(".net")
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={path.with_suffix('.profile')}", "--host-resolver-rules=MAP * ~NOTFOUND",
         f"--log-net-log={log}", "--enable-logging=stderr", "--v=0", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    events = (line.strip().rstrip(",") for line in log.read_text(encoding="utf-8", errors="replace").splitlines())
    found = [event["params"] for line in events if '"initiator"' in line for event in [json.loads(line)]]
    asked = {given["url"] for given in found if given["initiator"] != "not an origin" and "url" in given}
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line), asked


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium)")
def test_it_opens_with_the_network_off(tmp_path: Path) -> None:
    careless = tmp_path / "careless.html"
    careless.write_text("<img src='http://page.invalid/x.png'><script>console.log('ran')</script>", encoding="utf-8")
    _, console, asked = opened(careless)
    assert "ran" in console
    assert asked == {"http://page.invalid/x.png"}

    write_report(written(tmp_path / "r", HOSTILE), tmp_path / "r.html")
    dom, console, asked = opened(tmp_path / "r.html")
    assert "<title>lmrepair bench: tests" in dom
    assert len(Tags(dom).tags) > 500
    assert console == ""
    assert asked == set()
