"""Whatever goes wrong is one line and a status: streams, signals, disks, memory, and worlds that hypothesis builds."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle_models
import pytest
import typer
from hypothesis import HealthCheck, given, settings, strategies as st

from lmrepair import FailuresError, ModelError
from lmrepair.cli import main
from lmrepair.cli.faults import Stopped, guarded, verdict
from lmrepair.cli.output.console import open_streams, say, say_json
from lmrepair.failures import write_atomically
from lmrepair.measure import visible

ALLOCATOR = "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to …"


def caused(error: Exception, by: Exception) -> Exception:
    error.__cause__ = by
    return error


def noted(error: Exception, text: str) -> Exception:
    error.add_note(text)
    return error


VERDICTS: dict[str, tuple[BaseException, int, str]] = {
    "expected": (FailuresError("no such row"), 2, "no such row"),
    "usage": (typer.BadParameter("no such option"), 2, "see lmrepair --help"),
    "full disk": (OSError(errno.ENOSPC, "No space left on device", "p"), 2, "p: No space left on device; free some"),
    "file too large": (OSError(errno.EFBIG, "File too large", "p"), 2, "ulimit -f"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "p"), 2, "write elsewhere"),
    "memory": (MemoryError(), 2, "--layers last"),
    "memory with what fits": (noted(MemoryError(), "what fits: --limit 3"), 2, "; what fits: --limit 3; the model is"),
    "torch's memory": (RuntimeError(ALLOCATOR), 2, "out of memory (DefaultCPUAllocator"),
    "memory while loading": (caused(ModelError("cannot be loaded"), RuntimeError(ALLOCATOR)), 2, "--dtype bfloat16"),
    "memory of a template": (caused(FailuresError("the template's words"), MemoryError()), 2, "the template's words\n"),
    "no room for a thread": (RuntimeError("can't start new thread"), 2, "out of memory (can't start new thread)"),
    "the system's memory": (OSError(errno.ENOMEM, "Cannot allocate memory"), 2, "out of memory ([Errno 12] Cannot"),
    "GPU memory": (RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"), 2, "20.00 GiB"),
    "missing package": (ModuleNotFoundError("No module named 'peft'"), 2, "install"),
    "our own": (KeyError("x"), 2, "a fault of lmrepair's own, KeyError"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "interrupted; the model is as it was"),
    "SIGTERM": (Stopped(signal.SIGTERM), 143, "stopped by SIGTERM; the model is as it was"),
    "closed pipe": (BrokenPipeError(), 141, ""),
    "status": (typer.Exit(1), 1, ""),
}


@pytest.mark.parametrize("kind", VERDICTS)
def test_whatever_is_raised_has_a_status_and_at_most_one_line(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    error, code, said = VERDICTS[kind]

    def fail() -> int:
        raise error

    assert verdict(error)[0] == guarded(fail) == code
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == bool(said)
    assert captured.out == ""
    guarded(fail, debug=True)
    assert ("Traceback" in capsys.readouterr().err) == bool(said)


def test_debug_is_an_option_of_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["--debug", "show", "nothing"], ["show", "nothing", "--debug"], ["show", "nothing"]):
        monkeypatch.setattr(sys, "argv", ["lmrepair", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        err = capsys.readouterr().err
        assert stopped.value.code == 2
        assert ("Traceback" in err) == ("--debug" in arguments)
        assert err.splitlines()[-1].startswith("lmrepair: error: nothing")


class Full(io.StringIO):
    """A stream on a full disk, or at a closed pipe."""

    encoding = "utf-8"

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 2), (errno.EPIPE, 141)])
def test_output_that_cannot_be_written_is_no_traceback(
    number: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", Full(number))
    assert guarded(lambda: say("a line") or 0) == code
    assert capsys.readouterr().err.count("\n") == (code == 2)


def test_streams_that_know_few_characters_get_what_they_know(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    open_streams()
    say("✗ a → ‘b’ …")
    say("é 日")
    say_json({"a": "日 😀 \udcff"})
    lines = raw.getvalue().decode("ascii").splitlines()
    assert lines[:2] == ["x a -> 'b' ...", "\\xe9 \\u65e5"]
    assert json.loads(lines[2]) == {"a": "日 😀 \udcff"}


def test_closed_streams_lead_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert guarded(lambda: say("a line") or 0) == 0


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_a_signal_to_stop_undoes_what_is_half_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = signal.getsignal(signal.SIGTERM)

    def stopped_while_writing() -> int:
        real = os.fsync

        def fsync(handle: int) -> None:
            os.fsync = real
            os.kill(os.getpid(), signal.SIGTERM)
            real(handle)

        os.fsync = fsync  # type: ignore[assignment]
        write_atomically(tmp_path / "patch", b"half")
        return 0

    assert guarded(stopped_while_writing) == 143
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == "lmrepair: error: stopped by SIGTERM; the model is as it was\n"
    assert signal.getsignal(signal.SIGTERM) == kept


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
def test_a_limit_on_file_sizes_leaves_no_half_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import resource

    def write() -> int:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            write_atomically(tmp_path / "patch", b"x" * 5000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return 0

    assert guarded(write) == 2
    assert "ulimit -f" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_two_runs_that_share_a_cache_see_whole_files(tmp_path: Path) -> None:
    path, wrong = tmp_path / "cache", []

    def run(mark: bytes) -> None:
        for _ in range(20):
            write_atomically(path, mark * 5000)
            wrong.extend({path.read_bytes()} - {b"a" * 5000, b"b" * 5000})

    runs = [threading.Thread(target=run, args=(mark,)) for mark in (b"a", b"b")]
    for one in runs:
        one.start()
    for one in runs:
        one.join()
    assert not wrong
    assert list(tmp_path.iterdir()) == [path]


def test_a_user_without_a_home_is_told_that_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import pwd

    from lmrepair.methods import MinKl
    from lmrepair.model import statistics_of

    def nobody(_: int) -> Any:
        raise KeyError("getpwuid(): uid not found")

    for name in ("HOME", "LMREPAIR_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    asked = MinKl().asks()
    assert asked is not None
    net = oracle_models.net()
    assert statistics_of(net, asked, own=1).tokens > 0
    assert "statistics cannot be kept" in caplog.text
    assert "LMREPAIR_CACHE" in caplog.text


@pytest.mark.parametrize("terminal", ["dumb", "xterm"])
def test_bars_are_for_terminals_that_can_draw_them(terminal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmrepair.cli.output import progress_bars
    from lmrepair.model import quiet

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", terminal)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bars() as progress:
        assert (progress is quiet) == (terminal == "dumb")


def test_no_duration_is_read_from_a_clock_that_jumps() -> None:
    package = Path(sys.modules["lmrepair"].__file__ or "").parent
    assert not [path for path in package.rglob("*.py") if "time.time(" in path.read_text(encoding="utf-8")]


TEXT = st.text(st.characters(exclude_categories=()), max_size=6) | st.sampled_from(["", "a", "</s>", "\ud800", "日"])
ROW = st.fixed_dictionaries(
    {},
    optional={
        "prompt": TEXT | st.none(),
        "target": TEXT | st.just("x " * 4000),
        "messages": st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXT})),
        "id": TEXT | st.integers() | st.none(),
        "paraphrases": st.lists(TEXT, max_size=2),
        "completion": TEXT,
        "tool": TEXT,
    },
)
SOUND = st.fixed_dictionaries({"prompt": TEXT, "target": st.sampled_from(["b", "</s>", " hi", "x " * 4000])})
CONTENT = st.lists(SOUND | ROW, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()) | st.binary(
    max_size=20
)
EXAMPLES = 12
GIVEN = ["rows", "rows", "-", ".", "missing", "patch", "café \udcff"]
COMMANDS: list[Callable[[str], list[str]]] = [
    lambda path: ["diagnose", path],
    lambda path: ["diagnose", path, "--json", "--chat"],
    lambda path: ["diagnose", path, "--template", "# {prompt}\\n{target}"],
    lambda path: ["repair", path, "--method", "star", "--epochs", "1", "--max-kl", "inf", "--reference", "text"],
    lambda path: ["repair", "sound", "--method", "star", "--epochs", "1", "--protect", path, "--reference", "text"],
    lambda path: ["repair", "sound", "--method", "star", "--epochs", "1", "--max-kl", "inf", "--output", path],
    lambda path: ["evaluate", path, "--no-texts", "--reference", "text"],
    lambda path: ["evaluate", "sound", "--no-texts", "--reference", f"kind={path}"],
    lambda path: ["show", path],
    lambda path: ["verify", path, "--reference", "text"],
    lambda path: ["apply", path, "--model", ".", "--output", "out"],
    lambda path: ["bench", path, "--output", "out"],
    lambda path: ["report", path, "--output", "page.html"],
]


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_no_row_folder_or_stream_makes_a_traceback(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lmrepair.model.load", lambda *_, **__: oracle_models.net())
    Path("text").write_text("a text to read\n" * 3)
    Path("sound").write_text('{"prompt": "say", "target": " hi"}\n')
    Path("patch").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")

    @settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
    @given(CONTENT, st.sampled_from(GIVEN), st.sampled_from(["utf-8", "ascii", "latin-1"]), st.booleans())
    def walk(content: bytes, path: str, encoding: str, closed: bool) -> None:
        Path("rows").write_bytes(content)
        raw = io.BytesIO()
        with pytest.MonkeyPatch.context() as world:
            world.setattr(sys, "argv", ["lmrepair", *COMMANDS[number](path)])
            world.setattr(sys, "stdin", None if closed else io.TextIOWrapper(io.BytesIO(content)))
            world.setattr(sys, "stdout", out := io.TextIOWrapper(raw, encoding=encoding))
            with pytest.raises(SystemExit) as stopped:
                main()
        out.flush()
        err = capsys.readouterr().err
        assert stopped.value.code in (0, 1, 2)
        assert "Traceback" not in err
        assert "a fault of lmrepair's own" not in err
        assert err.count("lmrepair: error:") == (stopped.value.code == 2)
        assert err == "".join(visible(line, None) + "\n" for line in err.splitlines())
        assert raw.getvalue() == b"" or stopped.value.code != 2
        for name in ("out", "page.html", "rows.patch.safetensors", "failures.patch.safetensors"):
            assert stopped.value.code != 2 or not Path(name).exists()

    walk()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPIPE])
def test_standard_error_that_takes_nothing_changes_no_status(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Full(number)
    stream.fileno = lambda: os.open(os.devnull, os.O_WRONLY)  # type: ignore[method-assign]

    def refused() -> int:
        logging.getLogger("lmrepair").warning("a note")
        raise FailuresError("no such row")

    monkeypatch.setattr(sys, "stderr", stream)
    assert guarded(refused, debug=True) == 2


def test_a_pipe_that_a_command_finds_closed_is_status_141(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """typer catches it before we do, and would make it a 1."""
    monkeypatch.setattr(sys, "stdout", Full(errno.EPIPE))
    monkeypatch.setattr(sys, "argv", ["lmrepair", "--version"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 141
    assert capsys.readouterr().err == ""
