"""Write the reference text that ships: beginnings of held-out library files, and texts of other kinds.

    python training/reference.py

The Python part is taken from files of the standard library that ``train.py`` leaves out (PSF licence);
the other kinds are the files in ``training/reference/``, written for this purpose.
"""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

from train import held_out, read, source_files

HERE = Path(__file__).parent
OUTPUT = HERE.parent / "lmrepair" / "model" / "embedded" / "reference.jsonl"
FILES, CHARACTERS = 14, 900


def main() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    kept_back = [path for path in source_files(root) if held_out(path, root)]
    rows = []
    step = max(1, len(kept_back) // FILES)
    for path in kept_back[::step][:FILES]:
        for text in read([path]):
            if len(text) >= CHARACTERS:
                name = path.relative_to(root).as_posix()
                rows.append(
                    {"kind": "python", "source": f"CPython standard library, {name}", "text": text[:CHARACTERS]}
                )
    for path in sorted((HERE / "reference").iterdir()):
        rows.append({"kind": path.suffix[1:], "source": path.name, "text": path.read_text(encoding="utf-8")})
    OUTPUT.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{OUTPUT}: {len(rows)} texts, {sum(len(row['text']) for row in rows):,} characters")


if __name__ == "__main__":
    main()
