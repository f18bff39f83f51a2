"""Worlds: the ranks of one ring, as threads of this process or as processes of this machine.

The level of the suite that tests rings (`test_ring.py`) asks a backend's plugin for its worlds by the
hook `nibs_conformance_world`; a backend whose arrays are plain host memory can do without, for threads
are the default. Frameworks with collectives of their own bring processes:

    @hookimpl
    def nibs_conformance_world(backend, size):
        if backend == "abacus":
            from nibs_conformance.worlds import ProcessWorld

            return ProcessWorld(size, "nibs_abacus.ring:open_ring", preload=("abacus",))

where `open_ring(rank, size, folder, timeout)` joins the ranks (by a file in `folder`, say) and returns
their ring, anything that `ring=` takes. Processes are forked off a server that has imported the
frameworks once, live until the world is closed, and are killed with it; no process outlives its parent.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import suppress
from importlib import import_module
from types import TracebackType
from typing import Any

from nibs.threads import run

__all__ = ["Lost", "ProcessWorld", "ThreadWorld"]

RING_TIMEOUT = 20.0
"""Seconds that a rank of a test waits for another."""


class Lost(Exception):
    """What stands for the result of a rank whose process ended, or did not answer in time."""


class ThreadWorld:
    """Ranks as threads. A fresh ring for every job."""

    def __init__(self, size: int, ring_timeout: float = RING_TIMEOUT) -> None:
        self.size, self.ring_timeout = size, ring_timeout

    def run(self, job: str, *arguments: Any, timeout: float = 60.0) -> list[Any]:
        function = resolve(job)
        return run(
            self.size,
            lambda ring: function(ring, ring.rank, self.size, *arguments),
            timeout=self.ring_timeout,
            errors=True,
        )

    def __enter__(self) -> ThreadWorld:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is held."""


class ProcessWorld:
    """Ranks as processes of this machine, kept for many jobs.

    opener: `module:function(rank, size, folder, timeout) -> ring`, called in each process, and again with
    a new folder after `reopen()`. preload: modules to import once, before the processes are forked off.
    """

    def __init__(
        self, size: int, opener: str, preload: tuple[str, ...] = (), ring_timeout: float = RING_TIMEOUT
    ) -> None:
        self.size, self.opener, self.ring_timeout = size, opener, ring_timeout
        self.preload = [*preload, opener.partition(":")[0], __name__]
        self.folder = ""
        self.processes: list[Any] = []
        self.pipes: list[Any] = []

    def __enter__(self) -> ProcessWorld:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(self.preload)
        self.folder = tempfile.mkdtemp(prefix="nibs-world-")
        try:
            for rank in range(self.size):
                here, there = context.Pipe()
                arguments = (
                    there,
                    rank,
                    self.size,
                    self.opener,
                    self.folder,
                    self.ring_timeout,
                    list(sys.path),
                    os.getpid(),
                )
                process = context.Process(target=_rank, args=arguments, daemon=True)
                process.start()
                there.close()
                self.processes.append(process)
                self.pipes.append(here)
        except BaseException:
            self.close()
            raise
        return self

    def run(self, job: str, *arguments: Any, timeout: float = 60.0) -> list[Any]:
        """See `hookspecs.World`; a rank that is killed or silent gives `Lost`."""
        self.begin(job, *arguments)
        return self.results(timeout)

    def begin(self, job: str, *arguments: Any) -> None:
        """Start a job on every rank that is left."""
        for pipe in self.pipes:
            with suppress(OSError):
                pipe.send((job, arguments))

    def results(self, timeout: float = 60.0, ranks: list[int] | None = None) -> list[Any]:
        """What the ranks (all of them unless named) give back, in order."""
        deadline = time.monotonic() + timeout
        return [self._result(rank, deadline) for rank in (range(self.size) if ranks is None else ranks)]

    def _result(self, rank: int, deadline: float) -> Any:
        pipe = self.pipes[rank]
        try:
            if pipe.poll(max(deadline - time.monotonic(), 0)):
                return pipe.recv()
        except (EOFError, OSError):
            return Lost(f"rank {rank} has ended")
        return Lost(f"rank {rank} did not answer")

    def signal(self, rank: int, number: int) -> None:
        """Send a signal, such as SIGKILL or SIGSTOP, to one rank."""
        os.kill(self.processes[rank].pid, number)

    def close(self) -> None:
        """Kill what is left and wait for it."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()  # ends a stopped process as well, and is quiet about one that has just ended
            process.join()
        self.processes, self.pipes = [], []
        shutil.rmtree(self.folder, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def resolve(job: str) -> Any:
    """The function that `module:function` names."""
    module, _, name = job.partition(":")
    return getattr(import_module(module), name)


def _rank(
    pipe: Any, rank: int, size: int, opener: str, folder: str, ring_timeout: float, path: list[str], parent: int
) -> None:
    """One process: open the ring, then run jobs until the pipe closes."""
    sys.path[:] = path
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent closes the world
    ring = None
    try:
        ring = resolve(opener)(rank, size, folder, ring_timeout)
    except BaseException as error:
        ring = error
    while True:
        try:
            job, arguments = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)  # no atexit, no destructors that wait for lost peers
        try:
            if isinstance(ring, BaseException):
                raise ring
            answer: Any = resolve(job)(ring, rank, size, *arguments)
        except Exception as error:
            answer = error
        try:
            pipe.send(answer)
        except OSError:
            os._exit(0)
        except Exception as error:  # what cannot be pickled
            pipe.send(RuntimeError(f"{type(answer).__name__}: {answer} ({error})"))


def _die_with(parent: int) -> None:
    """End this process when the test process is gone, whose child it is by way of the fork server."""
    while True:
        time.sleep(1.0)
        try:
            os.kill(parent, 0)
        except OSError:
            os._exit(1)
