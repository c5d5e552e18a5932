"""The table of situations in docs/reliability.md is the harness's, and what only a process of its own can show."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import ROWS, write

ROOT = Path(__file__).resolve().parents[2]
UNKNOWN = ["unshare", "--user", "--map-user=54321", "--map-group=54321"]


def test_every_situation_has_a_row_and_every_row_its_tests() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| .*\| (`.*`) \|$", page, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 26))
    harness = (ROOT / "tests" / "hard" / "situations.py").read_text(encoding="utf-8")
    listed = harness.split("SITUATIONS: ")[1].split("= (")[1].split("\n)")[0]
    names = re.findall(r"\w+", listed)
    assert len(names) == len(rows)
    assert all(f"def {name}(world: World)" in harness for name in names)
    held = re.findall(r"`(\w+/test_\w+\.py)::(test_\w+)`", page)
    assert len(held) >= len(rows)
    for module, test in held:
        assert f"def {test}(" in (ROOT / "tests" / module).read_text(encoding="utf-8"), f"{module}::{test}"


@pytest.mark.skipif(os.name != "posix", reason="users by number")
def test_a_user_without_home_or_name_finishes_a_repair(tmp_path: Path) -> None:
    """As in a container: no HOME, a user id that no password file knows (where the system lets us be one)."""
    write(tmp_path / "rows.jsonl", ROWS[0])
    (tmp_path / "text.txt").write_text("for name in names:\n    print(name)\n", encoding="utf-8")
    nameless = ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME", "LMREPAIR_CACHE")
    world = {key: value for key, value in os.environ.items() if key not in nameless}
    can = (
        shutil.which(UNKNOWN[0]) and not subprocess.run([*UNKNOWN, "true"], capture_output=True, check=False).returncode
    )
    command = [sys.executable, "-m", "lmrepair", "repair", "rows.jsonl", "--reference", "text.txt", "--own-texts", "1",
               "--max-kl", "inf"]  # fmt: skip
    run = subprocess.run(
        [*(UNKNOWN if can else []), *command], cwd=tmp_path, env={**world, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "rows.patch.safetensors").exists()
    assert not can or "statistics cannot be kept" in run.stderr
    assert "Traceback" not in run.stderr
