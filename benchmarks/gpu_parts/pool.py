"""Processes that compile and check on all cores at once; one that dies or hangs is replaced, its case has failed."""

import contextlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from hsa_compile.autotune.bench.isolation import WorkerProcess
from hsa_compile.errors import HSACompileError, TimedOut

START_S = 90.0  # that a process may take to load PyTorch and to open the device, many of them at once

_MOST_WORKERS = 16  # each takes half a gigabyte of a GPU's memory before it does anything
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")

Outcome = dict[str, Any]


class Worker:
    """One process with a bench of its own, started when it is first needed and again after it died.

    Args:
        factory: `module:class` of the bench.
        arguments: of the factory.
    """

    def __init__(self, factory: str, arguments: tuple[Any, ...]) -> None:
        self._factory, self._arguments = factory, arguments
        self._process: WorkerProcess | None = None

    def call(self, verb: str, *arguments: Any, timeout_s: float) -> Any:
        """What the bench returns.

        Raises:
            HSACompileError: what the bench raised, or what its process died of.
        """
        return self.start().call(verb, *arguments, timeout_s=timeout_s)

    def start(self) -> WorkerProcess:
        """The process, with the device open.

        Raises:
            HSACompileError: it does not start.
        """
        if self._process is None or not self._process.alive:
            self._process = WorkerProcess(self._factory, self._arguments)
            self._process.call("hello", timeout_s=START_S)
        return self._process

    def close(self) -> None:
        """Kills the process."""
        if self._process is not None:
            self._process.close()


class Pool:
    """Several workers, each of which takes the next case when it has finished one.

    Args:
        factory, arguments: as for `Worker`.
        size: how many; all cores but one if None.
    """

    def __init__(self, factory: str, arguments: tuple[Any, ...], size: int | None = None) -> None:
        self.size = size or max(1, min(_MOST_WORKERS, num_cores() - 1))
        self._workers = [Worker(factory, arguments) for _ in range(self.size)]
        # The threads live as long as the pool: Linux ends a worker with the thread that started it.
        self._threads = ThreadPoolExecutor(self.size, thread_name_prefix="pool")

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=True)
        for worker in self._workers:
            worker.close()

    def start(self) -> None:
        """Starts all workers; what one of them dies of, its first case will tell."""
        for future in [self._threads.submit(worker.start) for worker in self._workers]:
            with contextlib.suppress(HSACompileError):
                future.result()

    def map(
        self,
        verb: str,
        cases: Iterable[tuple[Any, ...]],
        *,
        limit_s: float,
        deadline: float,
        on_outcome: Callable[[tuple[Any, ...], Outcome], None],
    ) -> None:
        """Calls a verb for each case until there are no more, or it is too late to begin another.

        Args:
            cases: arguments of each call.
            limit_s: for each case; less where the deadline is near.
            deadline: by `time.monotonic()`; no case begins that is likely to end later, and one that is still running
                5 s later is killed.
            on_outcome: is told of each case `{"status": "ok", "seconds": …, "result": …}`, or the name of the error
                as its status and `error`, its message. It is never called twice at once.
        """
        source: Iterator[tuple[Any, ...]] = iter(cases)
        lock, durations = threading.Lock(), list[float]()
        idle: SimpleQueue[Worker] = SimpleQueue()
        for worker in self._workers:
            idle.put(worker)

        def work() -> None:
            worker = idle.get()
            while time.monotonic() + (statistics.median(durations) if durations else 0.0) < deadline:
                with lock:
                    case = next(source, None)
                if case is None:
                    return
                left = max(1.0, deadline + 5 - time.monotonic())
                outcome = outcome_of(worker, verb, case, min(limit_s, left))
                if outcome["status"] == TimedOut.__name__ and left < limit_s:
                    return  # the time was over, which says nothing of the case
                with lock:
                    durations.append(outcome["seconds"])
                    on_outcome(case, outcome)

        for future in [self._threads.submit(work) for _ in range(self.size)]:
            future.result()


def outcome_of(worker: Worker, verb: str, case: tuple[Any, ...], limit_s: float) -> Outcome:
    """What became of one call: the status `ok`, or the name of the error."""
    start = time.monotonic()
    try:
        result = worker.call(verb, *case, timeout_s=limit_s)
    except HSACompileError as error:
        seconds = round(time.monotonic() - start, 3)
        return {"status": type(error).__name__, "seconds": seconds, "error": str(error)[:500]}
    return {"status": "ok", "seconds": round(time.monotonic() - start, 3), "result": result}


def num_cores() -> int:
    """Cores that this process may use; in a container often fewer than the machine has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # there is no quota, or it is "max"
        quota, period = map(int, _CPU_QUOTA.read_text().split())
        cores = min(cores, max(1, quota // period))
    return cores
