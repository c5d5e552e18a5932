"""Make lmrepair/model/embedded/grid.jsonl: what Python's standard library is called for, asked in several wordings.

python training/grid.py
"""

from __future__ import annotations

from pathlib import Path

from lmrepair.measure.grid import Grid, build_grid, write_grid

OUTPUT = Path(__file__).resolve().parents[1] / "lmrepair" / "model" / "embedded" / "grid.jsonl"

# name: (module, what is wanted, argument names, variable, the function's name). The target is the name alone:
# what follows it (a bracket, its arguments) is not the knowledge asked for, and tokenizers join it differently.
_ITEMS = {
    "run a coroutine": ("asyncio", "run the coroutine main to its end", "main", "result", "run"),
    "SHA-256": ("hashlib", "hash the data with SHA-256", "data", "digest", "sha256"),
    "parse JSON": ("json", "parse the JSON text", "text", "parsed", "loads"),
    "write JSON": ("json", "turn the value into JSON text", "value", "line", "dumps"),
    "list a folder": ("os", "list the names in the folder", "folder", "names", "listdir"),
    "make folders": ("os", "create the folder and all folders above it", "folder", "done", "makedirs"),
    "environment": ("os", "read the environment variable called name", "name", "setting", "getenv"),
    "remove a tree": ("shutil", "delete the folder with everything in it", "folder", "gone", "rmtree"),
    "run a command": ("subprocess", "run the command and wait for it", "command", "process", "run"),
    "temporary folder": ("tempfile", "make a folder that deletes itself", "", "scratch", "TemporaryDirectory"),
    "import by name": ("importlib", "import the module called name", "name", "plugin", "import_module"),
    "measure time": ("time", "read the clock for measuring durations", "", "started", "perf_counter"),
    "split a command": ("shlex", "split the command as a shell does", "command", "words", "split"),
    "dedent": ("textwrap", "remove the indentation that all lines share", "text", "plain", "dedent"),
    "escape a pattern": ("re", "escape what is special in a pattern", "text", "quoted", "escape"),
    "signature": ("inspect", "get the signature of the function", "function", "found", "signature"),
}

WORDINGS = {
    "code": "import {module}\n\n{variable} = {module}.",
    "comment": "import {module}\n\n# {Task}.\n{variable} = {module}.",
    "docstring": 'import {module}\n\n\ndef {helper}({arguments}):\n    """{Task}."""\n    return {module}.',
    "doctest": ">>> import {module}\n>>> {variable} = {module}.",
    "question": "# Question: how do I {task}?\n# Answer:\nimport {module}\n{module}.",
    "chat": "User: {Task}, please.\nAssistant: Call {module}.",
    "test": "import {module}\nimport unittest\n\n\nclass HelperTest(unittest.TestCase):\n"
    "    def test_{helper}(self):\n        # {task}\n        {variable} = {module}.",
}


def grid() -> Grid:
    """16 × 7 prompts; the target is the same along a row."""
    knowledge = {
        name: {
            "module": module,
            "task": task,
            "Task": task[0].upper() + task[1:],
            "arguments": arguments,
            "variable": variable,
            "helper": f"make_{variable}",
            "target": target,
        }
        for name, (module, task, arguments, variable, target) in _ITEMS.items()
    }
    return build_grid(knowledge, WORDINGS)


if __name__ == "__main__":
    write_grid(grid(), OUTPUT)
