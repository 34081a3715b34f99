"""A bench in a process of its own: what a candidate does there, it does to itself. The process is replaced."""

import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol

from hsa_compile.autotune.resources import Resources
from hsa_compile.autotune.worker_process import WorkerProcess
from hsa_compile.errors import CompileTimedOut, InvalidArgument, TimedOut
from hsa_compile.kernels.compile import build_native
from hsa_compile.kernels.emit import emit
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long and how large a candidate may be.

    Attributes:
        compile_s: for compiling it.
        run_s: for checking it, and for each set of timings; more where the default needs more than a tenth of that.
        first_s: for the first candidate, the default, with which nothing can be compared yet.
        memory_bytes: beyond what a worker has when it starts; None for no limit, as a GPU's driver needs.
    """

    compile_s: float = 120.0
    run_s: float = 20.0
    first_s: float = 600.0
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("compile_s", "run_s", "first_s", "memory_bytes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidArgument(f"{name} = {value} must be more than 0")


class IsolatedBench:
    """A `Bench` whose candidates live in a worker process; one that dies or hangs is replaced at the next call.

    Args:
        factory: `module:function` that opens the bench in the worker, such as `bench:open_bench`.
        arguments: of the factory.
        limits: what a candidate is killed for.
        lock: held while a candidate is on the device; it must be reentrant.
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
        self._prepare_s = self._time_s = 0.0  # of the first candidate; the latter for each call of it

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
        """Compiles in the worker.

        Raises:
            CompileTimedOut: it took too long.
        """
        try:
            return self._call("compile", schedule, timeout_s=self._limits.compile_s)
        except TimedOut as error:
            raise CompileTimedOut(str(error)) from error

    def prepare(self, schedule: Schedule) -> str:
        """Checks in the worker, while nobody else is on the device."""
        limit = max(self._limits.run_s, 10 * self._prepare_s) if self._prepare_s else self._limits.first_s
        with self._lock:
            start = time.monotonic()
            fingerprint: str = self._call("prepare", schedule, timeout_s=limit)
            self._prepare_s = self._prepare_s or time.monotonic() - start
        self._ready.add(schedule)
        return fingerprint

    def time(self, schedules: Sequence[Schedule], rounds: int) -> list[list[float]]:
        """Times in the worker, while nobody else is on the device; prepares again what a dead worker had ready."""
        calls = max(1, len(schedules) * rounds)
        limit = max(self._limits.run_s, 10 * calls * self._time_s) if self._time_s else self._limits.first_s
        with self._lock:
            self.start()
            for schedule in schedules:
                if schedule not in self._ready:
                    self.prepare(schedule)
            start = time.monotonic()
            times: list[list[float]] = self._call("time", list(schedules), rounds, timeout_s=limit)
            self._time_s = self._time_s or (time.monotonic() - start) / calls
        return times

    def _call(self, verb: str, *arguments: Any, timeout_s: float) -> Any:
        self.start()
        assert self._worker is not None
        self._worker.wait_until_open()
        return self._worker.call(verb, *arguments, timeout_s=timeout_s)


class Compiler(Protocol):
    """What a `CompilePool` compiles with: an `IsolatedBench` or a `LibraryBuilder`."""

    def compile(self, schedule: Schedule) -> Resources | None:
        """Compiles a candidate; what it uses, where the compiler says so."""

    def close(self) -> None:
        """Ends what it started."""


class LibraryBuilder:
    """Builds C++ candidates without loading them. The C++ compiler is a process of its own and needs no other.

    Args:
        problem, target: what candidates are emitted for.
    """

    def __init__(self, problem: Problem, target: Target) -> None:
        self._problem, self._target = problem, target

    def compile(self, schedule: Schedule) -> None:
        """Builds a candidate's library, unless it is there."""
        build_native(emit(self._problem, schedule, self._target))

    def close(self) -> None:
        """Does nothing: a build takes seconds and ends by itself."""


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
        for compiler in self._compilers:  # whose threads then see their worker die
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
