"""Twenty-five situations as people have them, each made anew and tried on the command line as real processes.

python tests/hard/situations.py            all of them; ends with an error where one does not go as written
python tests/hard/situations.py --only 5   some of them, by number
python tests/hard/situations.py --digests  the digests of a copied folder before and after apply and revert

They are numbered as in the table of docs/reliability.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "patch")]

LMREPAIR = [sys.executable, "-m", "lmrepair"]
ROW = {"prompt": "x = ", "target": "1\n", "id": "a"}
QUICK = ["--own-texts", "1", "--max-kl", "inf"]
USER = {"role": "user", "content": "hi"}
TURNS = (
    "{% for m in messages %}<s>{{ m.role }}:{{ m.content or '' }}{{ m.tool_calls | count if m.tool_calls }}{% endfor %}"
)
TEMPLATE = "{{ tools | count if tools }}" + TURNS + "{% if add_generation_prompt %}<s>assistant:{% endif %}"


class World:
    """A folder, and the command line as a process in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows(ROW)

    def rows(self, *rows: Mapping[str, Any], name: str = "rows.jsonl") -> None:
        self.file(name, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def file(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def run(
        self,
        *arguments: str,
        status: int,
        says: str = "",
        stdin: str | None = None,
        env: Mapping[str, str | None] | None = None,
        shell: str = "",
        before: Sequence[str] = (),
    ) -> str:
        """Output and error of ``lmrepair``; ``status`` and ``says`` (a pattern in either) are what must come.

        ``shell``: redirections; ``before``: what stands before the command.
        """
        command: Any = [*before, *LMREPAIR, *arguments]
        if shell:
            command = ["bash", "-c", f'set -o pipefail; "$@" {shell}', "bash", *command]
        world = {key: value for key, value in {**os.environ, **(env or {})}.items() if value is not None}
        world["PYTHONPATH"] = str(ROOT)
        run = subprocess.run(
            command, cwd=self.folder, env=world, input=stdin or "", capture_output=True, text=True, check=False
        )
        text = run.stdout + run.stderr
        assert run.returncode == status, f"{arguments}: status {run.returncode}, expected {status}\n{text}"
        assert "Traceback" not in text, text
        assert "a fault of lmrepair's own" not in text, text
        assert re.search(says, text), f"{arguments}: {says!r} is not in\n{text}"
        assert status not in (2, 143) or run.stderr.count("lmrepair: error:") == (0 if "2>" in shell else 1), text
        return text

    def tiny(self, name: str = "model", template: str = TEMPLATE, change: Callable[[Any], None] | None = None) -> Path:
        """A Llama of three layers, saved; ``change`` is done to the net before."""
        import oracle_models

        from lmrepair.patch import save_model

        net = oracle_models.net()
        net.tokenizer.chat_template = template
        if change:
            change(net)
        save_model(net, self.folder / name)
        return self.folder / name

    def sharded(self) -> Path:
        """A bfloat16 checkpoint in three shards, with tensors that no class loads, and its patch beside it."""
        from test_disk import checkpoint

        folder, _ = checkpoint(self.folder / "source")
        return folder


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def there_and_back(world: World, source: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The digests of ``source`` after apply and after revert, through the command line; the source keeps its own."""
    before = digests(source)
    world.run("apply", "patch.safetensors", "--model", source.name, "--output", "applied", status=0)
    world.run("revert", "patch.safetensors", "--model", "applied", "--output", "reverted", status=0)
    assert digests(source) == before
    assert digests(world.folder / "reverted") == before
    return digests(world.folder / "applied"), digests(world.folder / "reverted")


def set_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# --- 1. code without consent ----------------------------------------------------------------------


def custom_code(world: World) -> None:
    model = world.tiny()
    world.file("model/evil.py", f"open({str(world.folder / 'ran')!r}, 'w').close()\n".encode())
    names = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.Evil")
    set_json(model / "config.json", auto_map=names, model_type="evil")
    said = world.run(
        "diagnose", "rows.jsonl", "--model", "model", "--json", status=2, says="--trust-remote-code", stdin="y\n" * 9
    )
    assert "y/N" not in said
    assert not (world.folder / "ran").exists()


def pickles(world: World) -> None:
    import torch

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {world.folder / 'ran'}",)

    model = world.tiny()
    (model / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil()}, model / "pytorch_model.bin")
    world.run("diagnose", "rows.jsonl", "--model", "model", status=2, says="model")
    for arguments in (["show"], ["verify"], ["diagnose"], ["diagnose", "rows.jsonl", "--model"]):
        world.run(*arguments, "model/pytorch_model.bin", status=2)
    assert not (world.folder / "ran").exists()


def adapter(world: World) -> None:
    world.tiny()
    world.file("model/adapter_config.json", b'{"base_model_name_or_path": "someone/base"}')
    world.run("repair", "rows.jsonl", "--model", "model", status=2, says="holds an adapter .*someone/base.*merge")


def hostile_template(world: World) -> None:
    world.tiny(template="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    world.rows({"messages": [USER], "target": "b"})
    world.run("diagnose", "rows.jsonl", "--model", "model", status=2, says="failure '1': .*unsafe")


# --- 2. copies ------------------------------------------------------------------------------------


def extra_tensors(world: World) -> None:
    source = world.sharded()
    applied, _ = there_and_back(world, source)
    before = digests(source)
    changed = {name for name in before if before[name] != applied[name]}
    assert changed
    assert all(name.startswith("model-0000") for name in changed)


def mixed_folder(world: World) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    source = world.sharded()
    for path in source.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file({name: t.float() if "norm" in name else t for name, t in held.items()}, path, {"format": "pt"})
    set_json(source / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    applied, _ = there_and_back(world, source)
    for name in ("LICENSE", "tokenizer.model", "custom/modeling_own.py", "tokenizer_config.json"):
        assert applied[name] == digests(source)[name]


def cache_of_links(world: World) -> None:
    real = world.sharded()
    snapshot = world.folder / "snapshot"
    snapshot.mkdir()
    for path in real.rglob("*"):
        link = snapshot / path.relative_to(real)
        link.mkdir() if path.is_dir() else link.symlink_to(os.path.relpath(path, link.parent))
    before = digests(real)
    world.run(
        "apply", "patch.safetensors", "--model", "snapshot", "--in-place", status=2, says="is a link into a cache"
    )
    there_and_back(world, snapshot)
    assert digests(real) == before
    assert not any(path.is_symlink() for path in (world.folder / "applied").rglob("*"))


# --- 3. chats -------------------------------------------------------------------------------------


def tools(world: World) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "3"},
    ]
    world.tiny()
    world.rows({"messages": turns, "tools": [call], "target": "3"})
    world.run("diagnose", "rows.jsonl", "--model", "model", status=1, says="mistakes")
    world.rows({"messages": turns, "tool": [call], "target": "3"})
    world.run("diagnose", "rows.jsonl", "--model", "model", status=2, says="unknown key 'tool' .*'tools'")


def last_turn(world: World) -> None:
    world.tiny()
    said = {"role": "assistant", "content": "Hello"}
    world.rows({"messages": [USER, said]}, {"messages": [USER, said], "target": " there", "id": "on"})
    world.run("diagnose", "rows.jsonl", "--model", "model", status=1, says="Hello")
    world.rows({"messages": [USER, {"role": "assistant", "content": ""}], "target": "b"})
    world.run("diagnose", "rows.jsonl", "--model", "model", status=2, says="rows.jsonl|failure '1'")


def raising_template(world: World) -> None:
    world.tiny(template="{{ raise_exception('System role not supported') }}")
    world.rows({"messages": [{"role": "system", "content": "x"}, USER], "target": "b", "id": "sys"})
    world.run("diagnose", "rows.jsonl", "--model", "model", status=2, says="failure 'sys': .*System role not supported")


def second_bos(world: World) -> None:
    world.tiny()
    world.rows(*({"prompt": f"<s>user:hi{at}", "target": "b"} for at in range(3)))
    said = world.run("diagnose", "rows.jsonl", "--model", "model", status=1, says="leave it out of the prompt")
    assert said.count("lmrepair:") == 1


# --- 4. rows --------------------------------------------------------------------------------------


def forms(world: World) -> None:
    world.rows(
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "Hello"}]},
        {
            "task_id": "HumanEval/0",
            "prompt": "def f():\n",
            "canonical_solution": "    return 1\n",
            "test": "",
            "entry_point": "f",
        },
        {"task_id": 601, "text": "Write f.", "code": "def f(): pass", "test_list": ["assert f() is None"]},
        {"question": "Age?", "context": "Ann is 7.", "answers": {"text": ["7"]}},
        {"prompt": "2+2=", "completion": "4"},
    )
    world.tiny()
    said = world.run("diagnose", "rows.jsonl", "--model", "model", status=1, says="read as .*Alpaca")
    for form in ("ShareGPT", "HumanEval", "MBPP"):
        assert form in said


def encodings(world: World) -> None:
    text = json.dumps([ROW])
    world.file("bom.txt", b"\xef\xbb\xbf" + text.encode())
    world.run("diagnose", "bom.txt", status=1)
    world.run("diagnose", "-", status=1, stdin=json.dumps(ROW).replace("}", "}\r\n"))
    world.file("rows.csv", b'prompt,target\r\n"x = ",1\r\n')
    world.run("diagnose", "rows.csv", status=1)
    for name, code in (("utf-16", "utf-16"), ("no mark", "utf-16-le")):
        world.file(name, text.encode(code))
        world.run("diagnose", name, status=2, says="UTF-16.*iconv")
    world.file("short.csv", b"prompt,target\na,b,c\n")
    world.run("diagnose", "short.csv", status=2, says="line 2: 3 cells for 2 columns")


def empty_prompt(world: World) -> None:
    world.tiny()
    world.rows({"prompt": "", "target": "b"})
    world.run("repair", "rows.jsonl", "--model", "model", "--method", "star", *QUICK[2:], status=0, says="patch ")
    world.run("verify", "rows.patch.safetensors", "--model", "model", status=0)


def odd_json(world: World) -> None:
    odd = {
        '{"prompt": "a\\udfff", "target": "b"}': "half of a surrogate pair",
        '{"prompt": "a", "target": "b", "\\ud800": 1}': "surrogate",
        '{"prompt": "a", "target": "b", "id": ' + "9" * 5000 + "}": "more than 4300 digits",
        '{"prompt": "a", "target": "b", "metadata": ' + "[" * 5000 + "]" * 5000 + "}": "nested too deeply",
        '{"prompt": "a", "prompt": "c", "target": "b"}': "twice",
        '{"prompt": "a", "target": "b", "id": 1e999}': "id is a number",
        '{"prompt": "a", "target": "b"},': "broken JSON",
    }
    for text, says in odd.items():
        world.file("odd.jsonl", text.encode())
        world.run("diagnose", "odd.jsonl", status=2, says=says)


def odd_targets(world: World) -> None:
    world.tiny()
    world.rows({"prompt": "a", "target": "x " * 4000, "id": "long"})
    world.run("repair", "rows.jsonl", "--model", "model", status=2, says="failure 'long': .* tokens")
    world.rows({"prompt": "a", "target": "日本", "id": "cannot"})
    world.run("repair", "rows.jsonl", "--model", "model", status=2, says="failure 'cannot': the tokenizer cannot write")
    world.rows({"messages": [USER], "target": "</s>"})
    world.run("diagnose", "rows.jsonl", "--model", "model", status=1, says="1 of 1")
    world.rows({"prompt": "a", "target": ""})
    world.run("repair", "rows.jsonl", "--model", "model", status=2, says="target is empty")


# --- 5. models ------------------------------------------------------------------------------------


def odd_pad(world: World) -> None:
    outside = world.tiny("outside", change=lambda net: net.tokenizer.add_special_tokens({"pad_token": "<pad>"}))
    world.tiny("end", change=lambda net: net.tokenizer.add_special_tokens({"pad_token": "</s>"}))
    world.rows(ROW, {"prompt": "a longer prompt", "target": "b"})
    found = [
        world.run("diagnose", "rows.jsonl", "--model", name, status=1).replace(name, "")
        for name in (outside.name, "end")
    ]
    assert found[0] == found[1]


def not_finite(world: World) -> None:
    import torch

    def spoil(net: Any) -> None:
        with torch.no_grad():
            net.model.lm_head.weight.mul_(1e6)

    world.tiny(change=spoil)
    says = "no finite numbers in float16; .*lm_head.*float32"
    world.run("diagnose", "rows.jsonl", "--model", "model", "--dtype", "float16", "--json", status=2, says=says)
    world.run("diagnose", "rows.jsonl", "--model", "model", status=1)


def not_finite_with_patch(world: World) -> None:
    from dataclasses import replace

    import oracle_models
    import torch
    from oracle_models import FAILURES, TEXT, bold_star

    from lmrepair import repair

    net = oracle_models.net()
    patch = repair(net, FAILURES[:1], bold_star(learning_rate=0.1), TEXT).patch
    assert patch is not None
    patch.revert(net)
    layer, change = next(iter(patch.changes.items()))
    ruined = replace(change, deltas=torch.full_like(change.deltas, 3e38))  # type: ignore[type-var,call-arg]
    replace(patch, changes={**patch.changes, layer: ruined}).save(world.folder / "ruin")
    world.tiny()
    for arguments in (
        ["verify", "ruin", "--json"],
        ["evaluate", "rows.jsonl", "--patch", "ruin", "--no-texts", "--json"],
    ):
        said = world.run(*arguments, "--model", "model", status=2, says="no finite numbers.*the patch is damaged")
        assert "NaN}" not in said
    world.rows(ROW, {"prompt": "say", "target": " hi"})
    more = ["--learning-rate", "1e300", "--max-probe-kl", "inf"]
    world.run("repair", "rows.jsonl", "--model", "model", "--method", "sgd", *more, status=1, says="which was undone")


def sees(world: World) -> None:
    import transformers as hf

    text = hf.Gemma3TextConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=96, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = hf.Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    hf.Gemma3ForConditionalGeneration(config).save_pretrained(world.folder / "model")
    import oracle_models

    oracle_models.tokenizer().save_pretrained(world.folder / "model")
    world.run("diagnose", "rows.jsonl", "--model", "model", status=1, says="1 of 1")


def head_apart(world: World) -> None:
    import oracle_models
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=96, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(world.folder / "model")
    oracle_models.tokenizer().save_pretrained(world.folder / "model")
    apart = world.run("diagnose", "rows.jsonl", "--model", "model", status=1)
    set_json(world.folder / "model" / "config.json", tie_word_embeddings=True)
    assert world.run("diagnose", "rows.jsonl", "--model", "model", status=1) == apart


# --- 6. machines ----------------------------------------------------------------------------------


def nobody(world: World) -> None:
    nowhere: dict[str, str | None] = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME", "LMREPAIR_CACHE"))
    unknown = ["unshare", "--user", "--map-user=54321", "--map-group=54321"]
    can = (
        shutil.which("unshare") and subprocess.run([*unknown, "true"], check=False, capture_output=True).returncode == 0
    )
    before = unknown if can else []
    world.run(
        "repair", "rows.jsonl", *QUICK, status=0, says="cannot be kept.*LMREPAIR_CACHE", env=nowhere, before=before
    )
    closed = {"LMREPAIR_CACHE": "/dev/null/cache"}
    world.run("repair", "rows.jsonl", *QUICK, "--output", "b", status=0, says="cannot be kept", env=closed)


def full_disks(world: World) -> None:
    limit = ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash"]
    world.run("repair", "rows.jsonl", *QUICK, "--output", "p", status=2, says="ulimit -f", before=limit)
    assert not (world.folder / "p").exists()
    assert not [path for path in world.folder.iterdir() if path.name.startswith(".")]
    for extra in ([], ["--json"]):
        world.run("diagnose", "rows.jsonl", *extra, status=2, says="No space left", shell=">/dev/full")
    world.run("diagnose", "nothing", status=2, shell="2>/dev/full")
    world.run("repair", "rows.jsonl", "--output", "rows.jsonl/p", status=2, says="cannot be written")


def odd_streams(world: World) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TERM": "dumb", "NO_COLOR": "1"}
    said = world.run("diagnose", "rows.jsonl", status=1, env=plain)
    assert said.isascii()
    said = world.run("diagnose", "rows.jsonl", "--json", status=1, env=plain)
    assert json.loads(said)["failing"] == 1
    world.run("diagnose", "rows.jsonl", status=1, shell=">&-")
    world.run("diagnose", "rows.jsonl", status=1, shell="2>&-")
    world.run("diagnose", "rows.jsonl", status=1, shell="<&-")
    for arguments in (["repair", "--help"], ["diagnose", "rows.jsonl"]):
        world.run(*arguments, status=141, shell="| head -c0")


def stopped(world: World) -> None:
    """SIGTERM in the middle of a repair; two repairs at once over one empty cache; no memory."""
    cache = {"LMREPAIR_CACHE": str(world.folder / "cache"), "PYTHONPATH": str(ROOT)}
    command = [*LMREPAIR, "repair", "rows.jsonl", "--own-texts", "64", "--output"]
    start = {"cwd": world.folder, "env": {**os.environ, **cache}, "stderr": subprocess.PIPE, "stdout": subprocess.PIPE}
    one: Any = subprocess.Popen([*command, "one"], **start)  # type: ignore[call-overload]
    end = time.monotonic() + 300
    while not (world.folder / "cache").exists() and time.monotonic() < end and one.poll() is None:
        time.sleep(0.05)
    one.send_signal(signal.SIGTERM)
    out, err = one.communicate()
    assert (one.returncode, out) == (143, b"")
    assert err.endswith(b"lmrepair: error: stopped by SIGTERM; the model is as it was\n"), err
    assert not (world.folder / "one").exists()
    command[-2] = "2"
    two: list[Any] = [subprocess.Popen([*command, name], **start) for name in ("one", "two")]  # type: ignore[call-overload]
    assert [(each.communicate(), each.returncode)[1] for each in two] == [0, 0]
    assert not [path for path in (world.folder / "cache").rglob("*") if not path.name.startswith("statistics-")]
    little = ["bash", "-c", 'ulimit -v 400000; exec "$@"', "bash"]
    world.run("--version", status=0, before=little)
    world.run("diagnose", "rows.jsonl", status=2, says="out of memory|install lmrepair anew", before=little)


SITUATIONS: tuple[Callable[[World], None], ...] = (
    custom_code, pickles, adapter, hostile_template,
    extra_tensors, mixed_folder, cache_of_links,
    tools, last_turn, raising_template, second_bos,
    forms, encodings, empty_prompt, odd_json, odd_targets,
    odd_pad, not_finite, not_finite_with_patch, sees, head_apart,
    nobody, full_disks, odd_streams, stopped,
)  # fmt: skip


def digest_table(world: World) -> str:
    """Each file of a sharded checkpoint: its digest's first digits as it was, with the patch, and taken back."""
    source = world.sharded()
    before = digests(source)
    applied, reverted = there_and_back(world, source)
    lines = ["| file | source | applied | reverted |", "|---|---|---|---|"]
    for name, digest in before.items():
        shown = [digest, "the same" if applied[name] == digest else applied[name], reverted[name]]
        lines.append(f"| `{name}` | {' | '.join(text if text == 'the same' else text[:12] for text in shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, nargs="*")
    parser.add_argument("--digests", action="store_true")
    given = parser.parse_args()
    if given.digests:
        with tempfile.TemporaryDirectory() as folder:
            print(digest_table(World(Path(folder))))
        return
    wrong = 0
    for number, tried in enumerate(SITUATIONS, start=1):
        if given.only and number not in given.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                tried(World(Path(folder)))
            except AssertionError as error:
                wrong += 1
                print(f"{number}. {tried.__name__}: WRONG: {error}", flush=True)
            else:
                print(f"{number}. {tried.__name__}: as written", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
