"""Damaged files to every reader, led by the code they reach: a coverage-guided fuzzer beside the blind one.

    pip install 'lmrepair[fuzz]'
    python tests/hard/guided.py --inputs 100000

It starts from sound files and blindly damaged ones; an input that reaches new code of the package is kept and damaged
further. In three cases of four a patch gets a digest that fits. Each reader has a process of its own, which ends with
the first error that is not ours, after five seconds with one input, or beyond the memory it may have.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

READ = ["lmrepair.failures", "lmrepair.patch", "lmrepair.model", "lmrepair.errors"]  # whose code counts
FIRST = 200  # blindly damaged files to begin with
LONGEST = 1 << 16  # bytes of an input
SECONDS, MEGABYTES = 5, 3000  # for one input; for a process


def main() -> None:
    """Every reader in turn, in a process of its own; what came of it, a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="for each reader")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("readers", nargs="*", help="their names; all where there is none")
    given = parser.parse_args()
    if find_spec("atheris") is None:
        sys.exit("needs the extra fuzz: pip install 'lmrepair[fuzz]'")
    failed = [name for name in given.readers or names() if not led(name, given.inputs, given.seed)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def names() -> list[str]:
    """Of all readers."""
    import fuzz as blind

    with tempfile.TemporaryDirectory() as folder:
        return [kind for kind, _, _ in blind.readers(Path(folder))]


def led(name: str, inputs: int, seed: int) -> bool:
    """One reader in a process of its own; whether it had all inputs without a failure."""
    import fuzz as blind

    # The child ends without cleaning up, so the folder is not its own.
    with tempfile.TemporaryDirectory(dir=blind.MEMORY if blind.MEMORY.is_dir() else None) as folder:
        code = f"import guided; guided.run({name!r}, {inputs}, {seed}, {folder!r}, {str(Path.cwd())!r})"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, errors="replace"
        )
    said = done.stdout + done.stderr
    runs = re.findall(r"number_of_executed_units:\s*(\d+)", said)
    reached = re.findall(r"cov: (\d+)", said)
    if done.returncode or not runs or not reached:
        print(f"{name}: FAILED\n{said[-3000:]}", flush=True)
        return False
    print(f"{name}: {int(runs[-1]):,} inputs, {int(reached[0]):,} → {int(reached[-1]):,} branches reached", flush=True)
    return True


def run(name: str, inputs: int, seed: int, folder: str, kept: str) -> None:
    """Give a reader its inputs in a folder; ends the process. An input that fails is ``kept`` in another."""
    import atheris

    place = Path(folder)
    with atheris.instrument_imports(include=READ):
        import fuzz as blind

        known = {kind: (sound, read) for kind, sound, read in blind.readers(place)}
    sound, read = known[name]
    chance = random.Random(seed)
    (place / "corpus").mkdir()
    for at, raw in enumerate([sound, *(blind.spoiled(name, sound, chance) for _ in range(FIRST))]):
        (place / "corpus" / str(at)).write_bytes(raw)

    def one(raw: bytes) -> None:
        (place / "input.safetensors").write_bytes(raw)
        try:
            read(place / "input.safetensors")
        except blind.LmrepairError:
            return

    def mutated(raw: bytes, longest: int, number: int) -> bytes:
        changed = bytes(atheris.Mutate(raw, longest))
        stamp = name.startswith("patch") and number % 4
        return (blind.stamped(changed) if stamp else changed)[:longest]

    options = [f"-runs={inputs}", f"-seed={seed}", f"-max_len={max(LONGEST, 2 * len(sound))}"]
    options += [f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}", "-print_final_stats=1"]
    arguments = ["guided", *options, f"-artifact_prefix={kept}/fuzz.failed.", str(place / "corpus")]
    atheris.Setup(arguments, one, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
