"""Where memory runs out, what is said to fit does fit: sizes computed, and tried in processes with little memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import oracle_models
import pytest
from command import ROWS, write
from oracle_models import FAILURES

from lmrepair import MinKl, ModelError, Star
from lmrepair.cli.faults import fitting, load_advice, solve_advice, verdict
from lmrepair.measure import free
from lmrepair.patch import save_model

LITTLE = 120 << 20
# Two commands in a process that may take so much more memory than it has once the model is loaded: one for all rows,
# then one for as many as the first said would fit. Prints the status of each and what it said.
SCRIPT = """
import contextlib, functools, io, json, re, resource, sys
from lmrepair import model
from lmrepair.cli import main
room, real = int(sys.argv.pop(1)), model.load
@functools.cache
def load(*given, **named):
    net = real(*given, **named)
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room,) * 2)
    return net
model.load = load
def run(*more):
    sys.argv, code, said = [*given, *more], None, io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code
    return code, said.getvalue()
given = sys.argv
first = run()
print(json.dumps([first, run("--limit", re.search(r"--limit (\\d+)", first[1])[1])]))
"""


def limited(folder: Path, room: int) -> list[tuple[int, str]]:
    """Status and standard error of ``lmrepair repair`` with ``room`` bytes, for all rows and for those that fit."""
    given = ["repair", "rows.jsonl", "--method", "minkl", "--own-texts", "2", "--max-kl", "inf", "--epochs", "1"]
    command = [sys.executable, "-c", SCRIPT, str(room), *given, "--reference", "text.txt"]
    # The limit is on addresses, of which glibc reserves 64 MB for every thread that asks for memory.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert not run.returncode, run.stderr
    return json.loads(run.stdout)  # type: ignore[no-any-return]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space, as Linux does")
def test_what_is_said_to_fit_fits(tmp_path: Path) -> None:
    text = "# a line of text\n" * 8 + str(ROWS[0]["prompt"])
    rows = [{**ROWS[0], "prompt": f"x{at} = {at}\n{text}", "id": str(at)} for at in range(20)]
    write(tmp_path / "rows.jsonl", *rows)
    (tmp_path / "text.txt").write_text("for name in names:\n    print(name)\n", encoding="utf-8")
    (code, said), (later, nothing) = limited(tmp_path, LITTLE)
    assert code == 2, said
    assert "out of memory" in said
    assert said.count("\n") == 1 + said.count("lmrepair: statistics")
    found = re.search(r"what fits: --limit (\d+)", said)
    assert found, said
    assert 1 <= int(found[1]) < len(rows)
    assert later in (0, 1), nothing
    assert "out of memory" not in nothing


def test_the_advice_is_computed_from_failures_method_and_room() -> None:
    net = oracle_models.net()
    tokens = net.tokenize(FAILURES)
    whole = solve_advice(net, tokens, MinKl(), False, 1 << 40)
    assert whole.startswith("4 failures with minkl take about 0.0")
    assert "what fits: --limit 3 (" in whole
    assert "--alone (" in whole
    assert "--layers last (" in whole
    assert "--dtype bfloat16 (" in whole
    assert "nothing less fits: free some memory" in solve_advice(net, tokens, MinKl(), False, 0)
    assert "--limit" not in solve_advice(net, tokens[:1], MinKl(), False, 1 << 40)
    assert "--layers" not in solve_advice(net, tokens, MinKl(layers="last"), True, 1 << 40)
    assert "--alone" not in solve_advice(net, tokens, Star(), True, 1 << 40)


def test_of_a_folder_it_says_in_which_dtype_it_fits(tmp_path: Path) -> None:
    net = oracle_models.net()
    save_model(net, tmp_path / "model")
    numbers = sum(parameter.numel() for parameter in net.model.parameters())
    said = {room: load_advice(str(tmp_path / "model"), room) for room in (0, 3 * numbers, 5 * numbers)}
    assert "nothing less fits" in said[0]
    assert said[3 * numbers].endswith("what fits: --dtype bfloat16")
    assert said[5 * numbers].endswith("what fits: --dtype float32, --dtype bfloat16")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\xff" * 20)
    assert load_advice(str(tmp_path / "model"), 7) == load_advice(None, 7)


def test_only_what_runs_out_of_memory_is_noted() -> None:
    for error, noted in ((MemoryError(), True), (ModelError("another"), False)):
        with pytest.raises(type(error)) as caught, fitting(free(), lambda room: f"{room} were free"):
            raise error
        assert ("were free" in verdict(caught.value)[1]) == noted
    assert (free() or 1) > 0
