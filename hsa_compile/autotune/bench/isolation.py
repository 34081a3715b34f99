"""Benches in processes of their own, where a candidate that crashes or hangs harms nobody else, and parallel compiling.

A worker process that died is replaced at the next call.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from multiprocessing import Pipe
from queue import SimpleQueue
from typing import IO, Any, Protocol

from hsa_compile import errors
from hsa_compile.autotune.cost.roofline import Resources
from hsa_compile.autotune.options import Limits
from hsa_compile.errors import (
    CandidateCrashed,
    CandidateError,
    CompileTimedOut,
    HSACompileError,
    OutOfMemory,
    TimedOut,
)
from hsa_compile.kernels.compile import build_native
from hsa_compile.kernels.emit import emit
from hsa_compile.kernels.native import CxxRunner
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import Target

# Not multiprocessing's own start method: it runs the caller's main module anew, which a script without a
# `__name__` guard, or one from standard input, does not survive.
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1])\nfrom hsa_compile.autotune.bench.child import serve\n"
_START_S = 300.0
_MOST_STDERR = 1 << 16  # bytes that are looked through for the error
_DEATH_S = 10.0  # how long a process may take to end after its connection closed
_spawner: ThreadPoolExecutor


def _renew_spawner() -> None:
    """Makes the thread that starts all workers: Linux ends a worker with the thread that started it, not the process.

    A forked child has the object but not the thread, so it begins with a new one.
    """
    global _spawner
    _spawner = ThreadPoolExecutor(1, thread_name_prefix="spawn")


_renew_spawner()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_spawner)


def _spawn(handle: int, stderr: IO[bytes]) -> "subprocess.Popen[bytes]":
    # Others than texts may stand in the path; Python passes over them.
    path = json.dumps([place for place in sys.path if isinstance(place, str)])
    return subprocess.Popen(
        [sys.executable, "-c", f"{_BOOT}serve(int(sys.argv[2]))", path, str(handle)],
        pass_fds=(handle,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        start_new_session=True,
    )


class WorkerProcess:
    """A worker process in a session of its own, so that Ctrl-C does not reach it and its death reaches nobody else.

    Args:
        factory: `module:function` that opens the bench there.
        arguments: what the factory is called with; all of it must be picklable.
        memory_bytes: what it may map beyond what it needs to start; None for no limit.

    Raises:
        HSACompileError: the process does not start, or the factory fails.
    """

    def __init__(self, factory: str, arguments: tuple[Any, ...], memory_bytes: int | None = None) -> None:
        self._connection, theirs = Pipe()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the worker)
        self._process = _spawner.submit(_spawn, theirs.fileno(), self._stderr).result()
        theirs.close()
        self._opening: tuple[Any, ...] | None = (factory, arguments, memory_bytes)
        self._connection.send(self._opening)

    @property
    def alive(self) -> bool:
        """Whether the process can be called again."""
        return not self._connection.closed

    def wait_until_open(self) -> None:
        """Waits until the bench is open.

        Raises:
            HSACompileError: the bench cannot be opened.
        """
        if self._opening is None:
            return
        try:
            self._receive(_START_S)
        except HSACompileError as error:
            raise HSACompileError(f"a worker process cannot start: {error}") from error
        self._opening = None

    def call(self, verb: str, *arguments: Any, timeout_s: float) -> Any:
        """Calls a method of the bench by name, and returns what it returns.

        Raises:
            HSACompileError: the bench raised this error of the project.
            TimedOut: the call took too long, and the process was killed.
            OutOfMemory, CandidateCrashed, CandidateError: the process died.
        """
        self.wait_until_open()
        try:
            self._connection.send((verb, arguments))
        except OSError as error:  # the process died since it answered last
            raise self._death() from error
        return self._receive(timeout_s)

    def close(self) -> None:
        """Kills the process and all that it started; it may be called again, and from another thread."""
        with contextlib.suppress(ProcessLookupError):  # the process is gone, with all that it started
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()
        self._stderr.close()

    def _receive(self, timeout_s: float) -> Any:
        try:
            if not self._connection.poll(timeout_s):
                self.close()
                raise TimedOut(f"killed after {timeout_s:.0f} s")
            kind, *content = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        if kind == "done":
            return content[0]
        name, message = content
        raise getattr(errors, name)(message)

    def _death(self) -> HSACompileError:
        """Returns the error that says why the process ended."""
        try:
            code = self._process.wait(_DEATH_S)
        except subprocess.TimeoutExpired:
            self.close()
            return CandidateCrashed("its process closed the connection")
        error = self._error_line()
        self.close()
        if code == -signal.SIGKILL:
            return OutOfMemory("its process was killed, as Linux does where memory runs out")
        if code < 0:
            return CandidateCrashed(f"its process died of {signal.Signals(-code).name}")
        if code == 1 and error:
            return CandidateError(error)
        return CandidateCrashed(f"its process left with code {code}")

    def _error_line(self) -> str:
        """Returns the line of standard error that names the error: the first after the frames of the last traceback.

        PyTorch's messages about a GPU go on for several lines, of which the last ones are advice.
        """
        if self._stderr.closed:
            return ""
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - _MOST_STDERR))
        text = self._stderr.read().decode(errors="replace").strip()
        _, found, traceback = text.rpartition("Traceback (most recent call last):\n")
        if found:
            return next((line for line in traceback.splitlines() if line and not line.startswith(" ")), "")
        return text.splitlines()[-1] if text else ""


class IsolatedBench:
    """A `Bench` whose candidates live in a worker process; one that dies or hangs is replaced at the next call.

    Args:
        factory: `module:function` that opens the bench in the worker, such as `bench:open_bench`.
        arguments: what the factory is called with.
        limits: how long and how large a candidate may be before it is killed.
        lock: what is held while a candidate is on the device; it must be reentrant.
    """

    def __init__(
        self,
        factory: str,
        arguments: tuple[Any, ...],
        *,
        limits: Limits | None = None,
        lock: AbstractContextManager[Any] | None = None,
    ) -> None:
        self._factory, self._arguments = factory, arguments
        self._limits, self._lock = limits or Limits(), lock or contextlib.nullcontext()
        self._worker: WorkerProcess | None = None
        self._ready: set[Schedule] = set()
        # How long the first candidate, the default, took to prepare, and a call of it to time. It is trusted with more.
        self._first: Schedule | None = None
        self._prepare_s = self._time_s = 0.0

    def __enter__(self) -> "IsolatedBench":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Starts the worker without waiting for it."""
        if self._worker is None or not self._worker.alive:
            self._worker = WorkerProcess(self._factory, self._arguments, self._limits.memory_bytes)
            self._ready.clear()

    def close(self) -> None:
        """Kills the worker."""
        if self._worker is not None:
            self._worker.close()

    def compile(self, schedule: Schedule) -> Resources | None:
        """Compiles a candidate in the worker; returns what it uses, where the compiler says so.

        Raises:
            CompileTimedOut: the compiler took too long.
        """
        try:
            return self._call("compile", schedule, timeout_s=self._limits.compile_s)
        except TimedOut as error:
            raise CompileTimedOut(str(error)) from error

    def prepare(self, schedule: Schedule) -> str:
        """Checks a candidate in the worker, while nobody else is on the device; returns its source's fingerprint."""
        self._first = self._first or schedule
        limit = self._limit([schedule], 10 * self._prepare_s)
        with self._lock:
            start = time.monotonic()
            fingerprint: str = self._call("prepare", schedule, timeout_s=limit)
            self._prepare_s = self._prepare_s or time.monotonic() - start
        self._ready.add(schedule)
        return fingerprint

    def time(self, schedules: Sequence[Schedule], rounds: int, inputs: str | None = None) -> list[list[float]]:
        """Times candidates in the worker, alone on the device; what a dead worker had ready is prepared again."""
        calls = max(1, len(schedules) * rounds)
        limit = self._limit(schedules, 10 * calls * self._time_s)
        with self._lock:
            self.start()
            for schedule in schedules:
                if schedule not in self._ready:
                    self.prepare(schedule)
            start = time.monotonic()
            named = () if inputs is None else (inputs,)
            times: list[list[float]] = self._call("time", list(schedules), rounds, *named, timeout_s=limit)
            self._time_s = self._time_s or (time.monotonic() - start) / calls
        return times

    def _limit(self, schedules: Sequence[Schedule], usual_s: float) -> float:
        """Returns how long a call for these may take, if it usually takes so long at most, or 0 if nobody knows."""
        is_known = usual_s > 0 and any(schedule != self._first for schedule in schedules)
        return max(self._limits.run_s if is_known else self._limits.first_s, usual_s)

    def _call(self, verb: str, *arguments: Any, timeout_s: float) -> Any:
        self.start()
        assert self._worker is not None
        self._worker.wait_until_open()
        return self._worker.call(verb, *arguments, timeout_s=timeout_s)


class Compiler(Protocol):
    """A thing that a `CompilePool` compiles with: an `IsolatedBench` or a `LibraryBuilder`."""

    def compile(self, schedule: Schedule) -> Resources | None:
        """Compiles a candidate; returns what it uses, where the compiler says so."""

    def close(self) -> None:
        """Ends all that it started."""


class LibraryBuilder:
    """Builds C++ candidates without loading them: the C++ compiler is a process of its own, so it needs no worker.

    Args:
        problem, target: what candidates are emitted for.
        limits: how long a build may take before the compiler is killed.
    """

    def __init__(self, problem: Problem, target: Target, limits: Limits | None = None) -> None:
        self._problem, self._target = problem, target
        self._runner = CxxRunner((limits or Limits()).compile_s)

    def compile(self, schedule: Schedule) -> None:
        """Builds a candidate's library unless it is there.

        Raises:
            CompileError, CompileTimedOut, CacheError: as in `build_native`.
        """
        build_native(emit(self._problem, schedule, self._target), self._runner)

    def close(self) -> None:
        """Kills the compiler."""
        self._runner.close()


class CompilePool:
    """Compiles several candidates at once, ahead of their turn.

    Args:
        compilers: one for each candidate that is compiled at the same time.
    """

    def __init__(self, compilers: Sequence[Compiler]) -> None:
        self.size = len(compilers)
        self._compilers = list(compilers)
        self._idle: SimpleQueue[Compiler] = SimpleQueue()
        for compiler in self._compilers:
            self._idle.put(compiler)
        self._threads = ThreadPoolExecutor(self.size, thread_name_prefix="compile")

    def __enter__(self) -> "CompilePool":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for compiler in self._compilers:  # the threads that wait for them then see their worker die
            compiler.close()
        self._threads.shutdown(wait=True)

    def submit(self, schedule: Schedule) -> "Future[Resources | None]":
        """Starts to compile a candidate as soon as a compiler is free."""
        return self._threads.submit(self._compile, schedule)

    def _compile(self, schedule: Schedule) -> Resources | None:
        compiler = self._idle.get()
        try:
            return compiler.compile(schedule)
        finally:
            self._idle.put(compiler)
