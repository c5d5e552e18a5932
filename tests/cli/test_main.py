"""The command line as a user meets it: what it prints, what it exits with, and how it says no."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
from command import Run, write

from lmrepair import Star, cli, load
from lmrepair.failures import shipped
from lmrepair.methods import Step


def test_help_names_every_command_and_is_fast(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for command in ("demo", "diagnose", "repair", "evaluate", "verify", "show", "apply", "revert", "bench", "report"):
        assert command in out


def test_without_arguments_the_help_is_all(run: Run) -> None:
    code, out, err = run()
    assert code == 2
    assert "verified, reversible patch out" in " ".join((out + err).split())
    assert "error" not in err


def test_help_does_not_import_torch() -> None:
    script = (
        "import sys; from lmrepair import cli; sys.argv = ['lmrepair', 'repair', '--help']\n"
        "try: cli.main()\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


def test_every_field_of_every_method_is_a_flag(run: Run) -> None:
    from dataclasses import fields

    from lmrepair.methods import METHODS

    _, out, _ = run("repair", "--help")
    flags = "".join(out.split())
    for method in METHODS.values():
        for spec in fields(method):
            assert f"--{spec.name.replace('_', '-')}" in flags


def test_the_whole_way(run: Run, failures: Path) -> None:
    code, out, _ = run("diagnose", failures, "--json")
    found = json.loads(out)
    assert code == 1
    assert found["failing"] == 2
    assert found["items"][0]["mistakes"][0]["wanted_text"]

    # So short that as much as decides is all of it: repair and verify read the same.
    Path("text.txt").write_text("for name in names:\n    print(name)\n", encoding="utf-8")
    code, out, err = run("repair", failures, "--reference", "text.txt", "--output", "p.safetensors", "--json")
    data = json.loads(out)
    assert (code, err) == (0, "")
    assert data["failures"] == data["failing"] == data["repaired"] == 2
    assert data["mistakes_before"] > data["mistakes_after"] == 0
    assert data["patch"]["path"] == "p.safetensors"
    assert data["patch"]["bytes"] == Path("p.safetensors").stat().st_size
    assert data["patch"]["neurons"] > 0 < data["patch"]["layers"]
    assert data["drift"]["kl"] > 0
    assert 0 < data["drift"]["agreement"] <= 1
    assert data["cost"]["seconds"] > 0 < data["cost"]["forward_equivalents"]
    assert [(item["id"], item["repaired"], item["after"]) for item in data["items"]] == [("a", True, 0), ("b", True, 0)]

    code, out, _ = run("verify", "p.safetensors", "--reference", "text.txt", "--json")
    checked = json.loads(out)
    assert code == 0
    assert checked["verified"] is True
    assert (checked["failures"], checked["repaired"]) == (2, 2)
    assert checked["drift"]["kl"] == pytest.approx(data["drift"]["kl"], rel=1e-6)

    code, out, _ = run("show", "p.safetensors")
    assert code == 0
    assert "made for   embedded in float32" in out

    embedded = shipped("model")
    assert run("apply", "p.safetensors", "--model", embedded, "--output", "patched")[0] == 0
    code, out, _ = run("diagnose", failures, "--model", "patched", "--json")
    assert (code, json.loads(out)["failing"]) == (0, 0)
    assert run("verify", "p.safetensors", "--model", "patched", "--reference", "text.txt")[0] == 0
    assert run("revert", "p.safetensors", "--model", "patched", "--output", "back")[0] == 0
    code, out, _ = run("diagnose", failures, "--model", "back", "--json")
    again = json.loads(out)
    assert again["items"] == found["items"]

    code, _, err = run("apply", "p.safetensors", "--model", "patched", "--output", "twice")
    assert code == 2
    assert "already applied" in err
    assert not Path("twice").exists()
    code, _, err = run("revert", "p.safetensors", "--model", "back", "--output", "twice")
    assert code == 2
    assert "not applied" in err
    code, _, err = run("apply", "p.safetensors", "--model", embedded, "--output", "patched")
    assert code == 2
    assert "exists already" in err


def test_alone_gives_a_patch_a_failure(run: Run, failures: Path) -> None:
    Path("text.txt").write_text("for name in names:\n    print(name)\n", encoding="utf-8")
    text = ("--reference", "text.txt")
    code, out, _ = run("repair", failures, "--alone", "--output", "patches", *text, "--json")
    data = json.loads(out)
    assert code == 0
    assert data["repaired"] == 2
    names = sorted(path.name for path in Path("patches").iterdir())
    assert names == ["0001-a.safetensors", "0002-b.safetensors"]
    assert run("verify", f"patches/{names[1]}", *text)[0] == 0


def test_what_cannot_be_repaired_is_said_with_status_1(run: Run, failures: Path) -> None:
    code, out, _ = run("repair", failures, "--method", "star", "--epochs", 1, "--learning-rate", 1e-9, "--json")
    data = json.loads(out)
    assert code == 1
    assert data["repaired"] == 0
    assert data["patch"] is None
    assert all("still mistaken" in item["reason"] for item in data["items"])
    assert not list(Path().glob("*.safetensors"))


def test_the_text_output_escapes_what_drives_terminals(run: Run, tmp_path: Path) -> None:
    row = {"prompt": "x = \x1b[31m[bold]red[/bold]", "target": "\x1b]0;title\x07 = 1\n"}
    code, out, _ = run("repair", write(tmp_path / "f.jsonl", row), "--method", "sgd", "--epochs", 1)
    assert code in (0, 1)
    assert "\x1b" not in out
    assert "[bold]" in out


BAD = {
    "missing file": (None, ["nowhere.jsonl"], "nowhere.jsonl: no such file"),
    "broken JSON": (b'{"prompt": "a", "target": "b"}\n{"prompt": \n', [], "line 2: broken JSON"),
    "missing key": (b'{"prompt": "a", "tagret": "b"}\n', [], "line 1: unknown key 'tagret' (did you mean 'target'?)"),
    "empty target": (b'{"prompt": "a", "target": ""}\n', [], "line 1: the target is empty"),
    "not UTF-8": (b'{"prompt": "a", "target": "\xff"}\n', [], "line 1: not UTF-8"),
    "empty file": (b"", [], "no failures in it"),
    "duplicate ids": (
        b'{"id": 1, "prompt": "a", "target": "b"}\n{"id": "1", "prompt": "c", "target": "d"}\n',
        [],
        "line 2: id '1' is already used in ",
    ),
    "contradiction": (
        b'{"prompt": "a", "target": "b"}\n{"prompt": "a", "target": "c"}\n',
        [],
        "want different targets for one prompt",
    ),
    "too long": (b'{"prompt": "a", "target": "' + b"x = 1; " * 3000 + b'"}\n', [], "the model's context is"),
    "unknown method": (b'{"prompt": "a", "target": "b"}\n', ["--method", "start"], "did you mean 'star'?"),
    "unknown option": (b'{"prompt": "a", "target": "b"}\n', ["--lerning-rate", "1"], "--learning-rate"),
    "argument as an option": (
        b'{"prompt": "a", "target": "b"}\n',
        ["--failures", "a.jsonl"],
        "--failures is no option but an argument: repair FAILURES …",
    ),
    "unknown preset": (b'{"prompt": "a", "target": "b"}\n', ["--preset", "papr"], "did you mean 'paper'?"),
    "bad value": (b'{"prompt": "a", "target": "b"}\n', ["--epochs", "many"], "--epochs"),
    "bad share": (b'{"prompt": "a", "target": "b"}\n', ["--share", "2"], "share '2' is out of range"),
    "bad mode": (b'{"prompt": "a", "target": "b"}\n', ["--mode", "bach"], "mode 'bach' is unknown"),
    "bad template": (b'{"prompt": "a", "target": "b"}\n', ["--template", "{prompt}"], "{target} 0 times"),
    "unknown dtype": (b'{"prompt": "a", "target": "b"}\n', ["--dtype", "float23"], "did you mean 'float32'?"),
    "unknown device": (b'{"prompt": "a", "target": "b"}\n', ["--device", "gpu"], "unknown device 'gpu'"),
    "no such model": (b'{"prompt": "a", "target": "b"}\n', ["--model", "./nothing"], "no such model folder"),
    "output is a folder": (b'{"prompt": "a", "target": "b"}\n', ["--output", "."], "is a folder"),
    "statistics for nothing": (
        b'{"prompt": "a", "target": "b"}\n',
        ["--method", "sgd", "--statistics", __file__],
        "methods that do: star",
    ),
    "no text at all": (b'{"prompt": "a", "target": "b"}\n', ["--own-texts", "0"], "0 texts of the model's own"),
    "no statistics": (b'{"prompt": "a", "target": "b"}\n', ["--statistics", "none.txt"], "none.txt"),
    "no rows for statistics": (
        b'{"prompt": "a", "target": "b"}\n',
        ["--statistics", "none.jsonl"],
        "none.jsonl: no such",
    ),
    "preset of another": (b'{"prompt": "a", "target": "b"}\n', ["--preset", "paper"], "these have it: star"),
    "no reference": (b'{"prompt": "a", "target": "b"}\n', ["--reference", "none.txt"], "none.txt"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line_and_status_2(case: str, run: Run, tmp_path: Path) -> None:
    content, arguments, said = BAD[case]
    arguments = list(arguments)
    if content is not None:
        path = tmp_path / "failures.jsonl"
        path.write_bytes(content)
        arguments.insert(0, str(path))
    code, out, err = run("repair", *arguments)
    assert code == 2
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_an_encoder_is_refused(run: Run, failures: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    sizes = {"vocab_size": 4096, "hidden_size": 16, "intermediate_size": 32}
    config = BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(shipped("model")).save_pretrained(tmp_path / "bert")
    code, _, err = run("repair", failures, "--model", tmp_path / "bert")
    assert code == 2
    assert "encoder" in err or "missing keys" in err


def test_a_dtype_that_is_slow_here_is_said(run: Run, failures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmrepair import measure

    assert "slow:" not in run("diagnose", failures, "--dtype", "float32")[2]
    monkeypatch.setattr(measure, "slowness", lambda _: 17.2)
    _, _, err = run("diagnose", failures, "--dtype", "bfloat16")
    assert "slow: a gradient's products in bfloat16 take 17 times as long as in float32 here" in err


def test_a_quantised_model_is_refused(run: Run, failures: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(shipped("model"), tmp_path / "quantised")
    config = json.loads((tmp_path / "quantised" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(config))
    code, _, err = run("repair", failures, "--model", tmp_path / "quantised")
    assert code == 2
    assert "quantised" in err


def test_weights_that_no_patch_file_holds_are_refused_before_the_work(run: Run, failures: Path, tmp_path: Path) -> None:
    net = load(None, dtype="float32")
    net.model.double().save_pretrained(tmp_path / "double")
    net.tokenizer.save_pretrained(tmp_path / "double")
    code, _, err = run("repair", failures, "--model", tmp_path / "double")
    assert code == 2
    assert "its weights are float64" in err
    assert "--dtype float32" in err
    assert run("diagnose", failures, "--model", tmp_path / "double", "--dtype", "float32")[0] == 1


def test_a_damaged_patch_is_refused(run: Run, failures: Path) -> None:
    assert run("repair", failures, "--output", "p.safetensors", "--limit", 1)[0] == 0
    raw = bytearray(Path("p.safetensors").read_bytes())
    raw[-1] ^= 1
    Path("p.safetensors").write_bytes(raw)
    for command in (["show"], ["verify"], ["apply", "--model", "embedded", "--output", "o"]):
        code, out, err = run(command[0], "p.safetensors", *command[1:])
        assert (code, out) == (2, "")
        assert "damaged" in err


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_leaves_no_patch_and_says_so(tmp_path: Path) -> None:
    write(tmp_path / "f.jsonl", *({"prompt": f"x{i} = ", "target": f"'{i} of many'\n"} for i in range(8)))
    # In the middle of a solve, which the file says has begun.
    method = ["--method", "star", "--mode", "batch", "--no-early", "--epochs", "100000"]
    child = os.fork()  # a process of its own that has torch already
    if not child:
        in_the_child(tmp_path, ["lmrepair", "repair", "f.jsonl", *method])
    while not (tmp_path / "begun").exists():
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.02)
    os.kill(child, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert (tmp_path / "err").read_text(encoding="utf-8") == "lmrepair: error: interrupted; the model is as it was\n"
    assert not list(tmp_path.glob("*.safetensors"))


def in_the_child(folder: Path, arguments: list[str]) -> NoReturn:
    """Run a command whose solve leaves a mark, with its own standard error and a heed of Ctrl-C; never return."""
    code, solve = 1, Star.solve

    def marked(*given: Any) -> Step:
        Path("begun").touch()
        return solve(*given)

    try:
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
        sys.stderr = open("err", "w", encoding="utf-8")  # noqa: SIM115
        sys.argv, Star.solve = arguments, marked  # type: ignore[method-assign]
        cli.main()
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    finally:
        sys.stderr.close()
        os._exit(code)


def test_the_one_seed_reaches_the_methods_that_draw() -> None:
    from lmrepair.cli.options import chosen_method

    assert chosen_method("lora", None, 7, {"rank": None}).settings()["seed"] == 7
    assert chosen_method("mint", "paper", 3, {"factor": 0.1}).settings().items() >= {"seed": 3, "factor": 0.1}.items()
    assert "seed" not in chosen_method("star", None, 7, {}).settings()
