"""The census of transformers' causal language models: a part of it run anew, and its table as the page shows it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "census"
# Tied and untied heads, a scale and a cap behind them, Conv1D, biases, norms around a block, side by side with
# attention, without a gain, recurrences, a wrapper around a text model, Gemma 4's projection beside the FFN, a mixture,
# an FFN output that is added to in place.
KINDS = ("llama", "gpt2", "gemma2", "cohere", "gptj", "falcon", "olmo", "recurrent_gemma", "gemma3", "gemma4_text",
         "mixtral", "bart", "xlnet")  # fmt: skip


@pytest.fixture(scope="module")
def scripts() -> Mapping[str, ModuleType]:
    """The census's scripts by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return {name: __import__(name) for name in ("tiny", "trial", "table", "census")}


@pytest.fixture(scope="module")
def committed(scripts: Mapping[str, ModuleType]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(scripts["census"].RECORD.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_does_what_the_record_says(
    kind: str, scripts: Mapping[str, ModuleType], committed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmrepair.model.statistics.gathering.LENGTH", 24)  # tokens of a text that the model writes
    found: dict[str, Any] = {}
    for fact in scripts["trial"].trial(kind):
        found |= fact
    (row,) = (row for row in committed["rows"] if row["kind"] == kind)
    reason = scripts["table"].reason
    assert reason(found.get("refused", "")) == reason(row.get("refused", ""))
    for name in ("class", "traits", "layers", "neurons", "places"):
        assert found.get(name) == row.get(name)
    assert ("off" in found) == ("off" in row)
    assert found.get("off", 0) < scripts["table"].FAR
    for method in scripts["table"].METHODS if "places" in found else ():
        assert found[method]["reverted"]
        assert found[method]["repaired"] == row[method]["repaired"]
        assert not found[method].get("elsewhere")


def test_the_page_shows_the_record(scripts: Mapping[str, ModuleType], committed: dict[str, Any]) -> None:
    assert [row["kind"] for row in committed["rows"]] == list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert committed["counts"] == scripts["table"].counts(committed["rows"])
    page = scripts["census"].PAGE.read_text(encoding="utf-8")
    assert scripts["table"].written(page, scripts["table"].table(committed)) == page


def test_nothing_that_is_placed_is_wrong_or_stays_changed(committed: dict[str, Any]) -> None:
    counts, rows = committed["counts"], committed["rows"]
    assert counts["built"] >= 160
    assert counts["placed"] == counts["proved again"]
    for row in rows:
        for method in ("star", "minkl"):
            assert row.get(method, {"reverted": True})["reverted"], row["kind"]


def test_the_neurons_of_another_matrix_are_not_as_predicted(scripts: Mapping[str, ModuleType]) -> None:
    """The census's own proof fails where coefficients belong to something else than what is written to."""
    trial = scripts["trial"]
    net = trial.Net(scripts["tiny"].tiny_model("llama", trial.VOCABULARY), trial.ascii_tokenizer())
    failure = trial.failing(net)
    assert trial.off_by(net, failure, 0) < scripts["table"].FAR
    first, second = (net.model.model.layers[at].mlp.down_proj for at in (0, 1))
    read = torch.nn.functional.linear
    first.forward = lambda x: read(x, second.weight)
    assert trial.off_by(net, failure, 0) > scripts["table"].FAR


def test_a_class_that_dies_or_hangs_is_a_row_of_the_table(
    scripts: Mapping[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "census.py"
    script.write_text(
        "import sys, time, os\n"
        "for line in sys.stdin:\n"
        '    print(\'{"class": "A"}\', flush=True)\n'
        "    if line.strip() == 'hangs': time.sleep(60)\n"
        "    if line.strip() == 'dies': sys.exit('no memory')\n"
        "    print(flush=True)\n"
    )
    monkeypatch.setattr(scripts["census"], "__file__", str(script))
    rows = scripts["census"].census(["good", "dies", "hangs", "again"], 1, 2.0, lambda _: None)
    assert rows == [
        {"kind": "good", "class": "A"},
        {"kind": "dies", "class": "A", "error": "no memory"},
        {"kind": "hangs", "class": "A", "error": "no end after 2 seconds"},
        {"kind": "again", "class": "A"},
    ]
    assert subprocess.run([sys.executable, str(FOLDER / "census.py"), "--help"], check=False).returncode == 0
