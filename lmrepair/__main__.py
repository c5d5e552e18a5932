"""``python -m lmrepair``: the same as the command ``lmrepair``."""

from lmrepair.cli import main

if __name__ == "__main__":
    main()
