"""Whatever goes wrong is one line on standard error and an exit status; a traceback only with ``--debug``."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

import typer

from lmrepair.cli.output import drop_output, notes, open_streams, say, unheard
from lmrepair.errors import FailuresError, LmrepairError
from lmrepair.measure import visible

BAD, INTERRUPTED, PIPE_CLOSED = 2, 130, 141
AS_IT_WAS = "the model is as it was"
ADVICE = {
    errno.ENOSPC: "free some space, or write elsewhere",
    errno.EDQUOT: "free some space, or write elsewhere",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or write less: --neurons 16, --layers last",
    errno.EROFS: "write elsewhere",
    errno.EACCES: "write where you may, or read what you may",
}
FITS = "less is needed with --layers last, --dtype bfloat16, or fewer failures at a time (--limit)"


class Stopped(BaseException):
    """A signal asked the process to stop; whatever is half done is undone on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def guarded(run: Callable[[], int | None], debug: bool = False) -> int:
    """Run a command and give its exit status, whatever happens in it."""
    open_streams()
    guard = _OneLine(debug)
    with notes(), guard, _stoppable():
        guard.code = run() or 0
        sys.stdout.flush()
    return guard.code


class _OneLine:
    """Turns whatever is raised inside into an exit status and at most one line."""

    def __init__(self, debug: bool) -> None:
        self.debug, self.code = debug, 0

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> bool:
        if error is None:
            return True
        self.code, line = verdict(error)
        if isinstance(error, OSError):
            drop_output()
        if line and self.debug:
            with unheard():
                traceback.print_exception(error)
        if line:
            complain(line)
        return True


def complain(line: str) -> None:
    """One line on standard error."""
    say(f"lmrepair: error: {visible(line, None)}", sys.stderr)


def verdict(error: BaseException) -> tuple[int, str]:
    """The exit status of what was raised, and the line that says it; no line where nothing is to be said."""
    if isinstance(error, SystemExit):
        return (error.code if isinstance(error.code, int) else BAD if error.code else 0), ""
    if isinstance(error, typer.Exit):
        return error.exit_code, ""
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return INTERRUPTED, f"interrupted; {AS_IT_WAS}"
    if isinstance(error, Stopped):
        return 128 + error.number, f"stopped by {error}; {AS_IT_WAS}"
    if isinstance(error, BrokenPipeError):
        return PIPE_CLOSED, ""
    # A template that asks for too much is the row's fault, and says so itself.
    short = None if isinstance(error, FailuresError) else memory_ran_out(error)
    if short is not None:
        fits = "; ".join(getattr(error, "__notes__", [FITS]))
        return BAD, f"out of memory ({_words(short)}); {fits}; {AS_IT_WAS}"
    if isinstance(error, LmrepairError):
        return BAD, str(error)
    if isinstance(error, typer.TyperException):
        text = _meant_as_argument(error) or getattr(error, "format_message", error.__str__)()
        return BAD, f"{text} (see lmrepair --help)" if text else ""  # without arguments the help was printed
    if isinstance(error, OSError):
        what = f"{error.filename}: " if error.filename is not None else ""
        return BAD, f"{what}{error.strerror or error}; {ADVICE.get(error.errno or 0, 'nothing was changed')}"
    if isinstance(error, ImportError):
        return BAD, f"{_words(error)}; install lmrepair anew, or the extra that brings it"
    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = "".join(f" at {os.path.basename(frame.filename)}:{frame.lineno}" for frame in where)
    return BAD, (
        f"a fault of lmrepair's own, {type(error).__name__}{place}: {_words(error)}; {AS_IT_WAS}; "
        "lmrepair --debug COMMAND … shows where: please report it"
    )


def _meant_as_argument(error: BaseException) -> str:
    """What to say where an unknown option is the name of one of the command's arguments; else nothing."""
    option, context = getattr(error, "option_name", ""), getattr(error, "ctx", None)
    if not option or context is None:
        return ""
    arguments = [str(one.name) for one in context.command.params if one.param_type_name == "argument"]
    if option.lstrip("-").replace("-", "_") not in arguments:
        return ""
    return f"{option} is no option but an argument: {context.info_name} {' '.join(arguments).upper()} …"


def memory_ran_out(error: BaseException) -> BaseException | None:
    """What says, of an error and its causes, that memory ran out; None where none does."""
    return next((one for one in _chain(error) if _is_out_of_memory(one)), None)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, the system's, torch's on the CPU (a bare RuntimeError) or on a GPU.

    Where no room is left for a thread's stack, Python says only that it could not start one.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = ("can't allocate memory", "out of memory", "can't start new thread")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _chain(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _words(error: BaseException) -> str:
    text = re.sub(r"^\[enforce fail at [^]]*\] (err == 0\. )?", "", " ".join(str(error).split()))
    return text[:200] or type(error).__name__


@contextmanager
def _stoppable() -> Iterator[None]:
    """Signals that ask to stop unwind what is under way, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise Stopped(number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for name in names if signal.getsignal(number := getattr(signal, name)) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
