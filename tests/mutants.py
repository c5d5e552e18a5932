"""Mutation run of one room: a seeded sample of its mutants, what became of each, and the share that tests kill.

    python tests/mutants.py failures --sample 200 --seed 0

mutmut makes the mutants and runs them, in a copy of the repository under build/mutants/ROOM. A mutant that runs
out of its time counts as killed; one that no test reaches counts as alive.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BESIDE = ("benchmarks", "docs", "README.md")  # what tests read besides the package and themselves

# A room's modules, and the tests that are its own: others may kill more of its mutants, these have to.
ROOMS: dict[str, tuple[list[str], list[str]]] = {
    "failures": (["lmrepair/failures/*.py"], ["tests/failures"]),
    "maths": (
        [f"lmrepair/methods/maths/{name}.py" for name in ("basis", "closed_form", "margins", "optimiser")],
        [f"tests/methods/test_{name}.py" for name in ("basis", "closed_form", "margins", "optimiser")],
    ),
    "minkl": (
        [f"lmrepair/methods/maths/{name}.py" for name in ("dual", "tail", "spans", "linearised")],
        ["tests/methods/test_minkl.py", "tests/methods/test_mint.py"],
    ),
    "methods": (
        ["lmrepair/methods/*.py", "lmrepair/methods/keyed/*.py", "lmrepair/methods/maths/direct_path.py"],
        ["tests/methods"],
    ),
    "patch": (["lmrepair/patch/*.py"], ["tests/patch"]),
    "loop": (["lmrepair/loop/*.py"], ["tests/loop", "--ignore=tests/loop/test_ranks.py"]),
}
KILLED = ("killed", "timeout", "segfault")


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    asked.add_argument("room", choices=ROOMS)
    asked.add_argument("--sample", type=int, default=200, help="how many mutants are drawn; 0 for all")
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    asked.add_argument("--only", nargs="*", default=(), help="names of mutants, instead of a sample")
    given = asked.parse_args()
    folder = copied(given.room)
    script = Path(__file__).resolve()
    room, rest = given.room, [str(given.sample), str(given.seed), str(given.jobs), *given.only]
    # mutmut reads its settings from the folder it is started in, and the package must come from its copy.
    raise SystemExit(subprocess.run([sys.executable, str(script), "--inside", room, *rest], cwd=folder).returncode)


def copied(room: str) -> Path:
    """A copy of the repository with the settings of a room's run; made anew, so that nothing old is read."""
    folder = ROOT / "build" / "mutants" / room
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("lmrepair", "tests", *BESIDE):
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target)
    modules, tests = ROOMS[room]
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    settings += f"only_mutate = {modules!r}\npytest_add_cli_args_test_selection = {tests!r}\n"
    settings += f"also_copy = {list(BESIDE)!r}\n"
    settings = settings.replace("\ntimeout = 300\n", "\ntimeout = 0\n")  # code that notes every call is slow
    (folder / "pyproject.toml").write_text(settings, encoding="utf-8")
    return folder


def inside(room: str, sample: int, seed: int, jobs: int, only: list[str]) -> None:
    """Make the mutants of the copy in the current folder, run those that are drawn, print what became of them."""
    # Not "import mutmut.__main__ as ...": its own re-import must find it under this name.
    from mutmut import __main__ as mutmut
    from mutmut.mutation.data import SourceFileMutationData

    Path("mutants").mkdir()
    mutmut.copy_src_dir()
    mutmut.copy_also_copy_files()
    mutmut.create_mutants(jobs)
    made = []
    for path in sorted(mutmut.walk_mutatable_files()):
        data = SourceFileMutationData(path=path)
        data.load()
        made += sorted(data.exit_code_by_key)
    drawn = made if not sample else sorted(random.Random(seed).sample(made, min(sample, len(made))))
    mutmut._run(tuple(only or drawn), jobs)
    report(room, len(made), seed, statuses(only or drawn))


def statuses(names: list[str]) -> dict[str, str]:
    from mutmut import __main__ as mutmut
    from mutmut.mutation.data import SourceFileMutationData

    codes: dict[str, int | None] = {}
    for path in mutmut.walk_mutatable_files():
        data = SourceFileMutationData(path=path)
        data.load()
        codes |= data.exit_code_by_key
    return {name: mutmut.status_by_exit_code[codes[name]] for name in names}


def report(room: str, made: int, seed: int, found: dict[str, str]) -> None:
    """The score, with Wilson's interval of 95 %, and every mutant that lives, with its change."""
    from mutmut import __main__ as mutmut

    killed = sum(status in KILLED for status in found.values())
    low, high = wilson(killed, len(found))
    alive = [name for name, status in found.items() if status not in KILLED]
    lines = [f"{room}: {killed} of {len(found)} killed ({killed / len(found):.1%}; 95 %: {low:.1%} to {high:.1%})"]
    lines += [f"seed {seed}, drawn from {made} mutants; alive: {len(alive)}"]
    for name in alive:
        shown = mutmut.get_diff_for_mutant(name, path=mutmut.find_mutant(name).path)
        changes = [line for line in shown.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
        lines += ["", f"{name}: {found[name]}", *changes]
    text = "\n".join(lines) + "\n"
    Path("../" + room + ".txt").write_text(text, encoding="utf-8")
    print(text)


def wilson(hits: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a share: hits of count."""
    share, weight = hits / count, z * z / count
    middle, half = share + weight / 2, z * math.sqrt(share * (1 - share) / count + weight / (4 * count))
    return (middle - half) / (1 + weight), (middle + half) / (1 + weight)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        chosen, size, start, processes, *names = sys.argv[2:]
        inside(chosen, int(size), int(start), int(processes), names)
    else:
        main()
