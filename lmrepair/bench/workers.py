"""Where the cells of a bench run: processes on this machine, or actors on a Ray cluster.

Both give what became of a job as a value: a cell that raises, and a worker that dies, end no bench.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from lmrepair.errors import LmrepairError, UsageError

Work = Callable[[Any], dict[str, Any]]


@dataclass(frozen=True)
class Ended:
    """What became of a job: its ``result``, or the ``error`` it raised, or neither where its worker died."""

    job: Any
    result: dict[str, Any] | None = None
    error: BaseException | None = None

    @property
    def died(self) -> bool:
        return self.result is None and self.error is None


class Workers(ABC):
    """Workers that take one job each, and which of them are at it."""

    def __init__(self, idle: Sequence[Any]) -> None:
        self._idle = list(idle)
        self._running: dict[Any, tuple[Any, Any]] = {}  # what stands for a job that is running → worker, job

    @property
    def free(self) -> int:
        return len(self._idle)

    @property
    def busy(self) -> int:
        return len(self._running)

    def submit(self, job: Any) -> None:
        worker = self._idle.pop()
        self._running[self._send(worker, job)] = worker, job

    @abstractmethod
    def _send(self, worker: Any, job: Any) -> Any:
        """Start a job; what stands for it while it runs."""

    @abstractmethod
    def wait(self) -> list[Ended]:
        """Wait until at least one job has ended."""

    @abstractmethod
    def close(self) -> None:
        """Stop all workers now, whatever they are doing."""


class Processes(Workers):
    """Processes on this machine, one job at a time each; they end when this process does, killed or not."""

    def __init__(self, work: Work, count: int) -> None:
        self._work = work
        self._context = multiprocessing.get_context("spawn")
        super().__init__([self._start() for _ in range(count)])

    def _start(self) -> tuple[ProcessPoolExecutor, Connection]:
        ours, theirs = self._context.Pipe()
        # A pool of one: when its process dies, it is known which job was on it.
        return ProcessPoolExecutor(1, self._context, initializer=_until_closed, initargs=(theirs,)), ours

    def _send(self, worker: Any, job: Any) -> Future[dict[str, Any]]:
        return cast("Future[dict[str, Any]]", worker[0].submit(self._work, job))

    def wait(self) -> list[Ended]:
        ended = []
        for future in wait(self._running, return_when=FIRST_COMPLETED).done:
            worker, job = self._running.pop(future)
            error = future.exception()
            if isinstance(error, BrokenExecutor):
                self._stop(worker)
                worker, error = self._start(), None
                ended.append(Ended(job))
            else:
                ended.append(Ended(job, error=error) if error else Ended(job, future.result()))
            self._idle.append(worker)
        return ended

    def close(self) -> None:
        for pool, ours in self._idle:
            pool.shutdown()
            ours.close()
        for worker, _ in self._running.values():
            self._stop(worker)
        self._idle, self._running = [], {}

    @staticmethod
    def _stop(worker: tuple[ProcessPoolExecutor, Connection]) -> None:
        """End a worker that may be in the middle of a job: its end of the pipe tells it."""
        pool, ours = worker
        ours.close()
        pool.shutdown(wait=True, cancel_futures=True)


def _until_closed(theirs: Connection) -> None:
    """Set a worker process up: Ctrl-C is its parent's affair, and it ends when the parent's end of a pipe does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        try:
            theirs.recv_bytes()
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class RayActors(Workers):
    """Actors on a Ray cluster, one job at a time each. In the place of one that dies comes another, on any node.

    Neither jobs nor actors are tried again by Ray: with retries on the task, one job that kills its process kills
    the actor for good, and an actor that Ray is about to restart refuses jobs as if it had died on them, where a
    new one lets them wait until it stands. Whoever submits decides.
    """

    def __init__(self, work: Work, count: int, on_gpu: bool = False) -> None:
        self._ray = _ray()
        if not self._ray.is_initialized():
            self._ray.init(include_dashboard=False, log_to_driver=False, logging_level="error", configure_logging=False)
        # Ray hides the GPUs from an actor that asks for none.
        gpus = min(1.0, self._ray.cluster_resources().get("GPU", 0.0) / count) if on_gpu else 0.0
        made = self._ray.remote(max_restarts=0, max_task_retries=0, num_cpus=1, num_gpus=gpus)(_Actor)
        self._start: Callable[[], Any] = lambda: made.remote(work)
        super().__init__([self._start() for _ in range(count)])

    def _send(self, worker: Any, job: Any) -> Any:
        return worker.run.remote(job)

    def wait(self) -> list[Ended]:
        ended = []
        for reference in self._ray.wait(list(self._running), num_returns=1)[0]:
            actor, job = self._running.pop(reference)
            try:
                ended.append(Ended(job, self._ray.get(reference)))
            except self._ray.exceptions.RayActorError:
                ended.append(Ended(job))
                self._ray.kill(actor)
                actor = self._start()
            except self._ray.exceptions.RayTaskError as error:
                ended.append(Ended(job, error=_cause(error)))
            self._idle.append(actor)
        return ended

    def close(self) -> None:
        for actor in (*self._idle, *(actor for actor, _ in self._running.values())):
            self._ray.kill(actor)
        self._idle, self._running = [], {}


def _cause(error: Any) -> BaseException:
    """What a job on Ray raised, with Ray's text of where as its cause."""
    if not isinstance(error.cause, Exception):
        return RuntimeError(str(error).splitlines()[-1])
    error.cause.__cause__ = error
    return error.cause


class _Actor:
    """What a Ray actor holds: the work it does for every job."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def run(self, job: Any) -> dict[str, Any]:
        return self._work(job)


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise UsageError("--executor ray needs Ray, which is an extra: pip install 'lmrepair[ray]'") from error
    return ray


def error_data(error: BaseException, private: Iterable[Path]) -> dict[str, Any]:
    """An error as plain data, without the folders of this machine; where it was raised if nobody expected it."""
    message = " ".join(str(error).split())
    for folder in sorted({str(folder) for folder in private}, key=len, reverse=True):
        message = message.replace(folder + os.sep, "").replace(folder, "…")
    at = ""
    if not isinstance(error, LmrepairError):
        # From another process comes the traceback's text, as the error's cause.
        text = str(error.__cause__) if error.__cause__ else "".join(traceback.format_tb(error.__traceback__))
        frames = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', text)
        at = "; ".join(f"{Path(file).name}:{line} {name}" for file, line, name in frames[-3:])
    return {"type": type(error).__name__, "message": message, "at": at}
