"""The bench, where candidates are compiled, checked and timed: its protocol, and a bench in the process that asks."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from hsa_compile.autotune.cost.roofline import Resources
from hsa_compile.autotune.options import input_names
from hsa_compile.errors import (
    CandidateCrashed,
    CandidateError,
    CompileError,
    OutOfMemory,
    OutOfResources,
    TimedOut,
    WrongResult,
    compile_error,
)
from hsa_compile.kernels.ahead_of_time import compile_launches
from hsa_compile.kernels.compile import compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.kernels.ops import OpInputs, all_inputs_of, check
from hsa_compile.problem import Problem
from hsa_compile.schedules.ops import backend_for
from hsa_compile.schedules.record import Measurement
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import Target

Call = Callable[[], object]

_FLUSH_BYTES = 256 << 20  # more than any GPU's L2 cache holds


def measure(calls: Sequence[Call], device: torch.device, *, rounds: int) -> list[list[float]]:
    """Times several calls in interleaved rounds: round after round, each call once, in alternating order.

    Args:
        calls: what to time, already warm.
        device: where they run; on a GPU times come from events, after the L2 cache was overwritten.
        rounds: how often each call is timed.

    Returns:
        for each call its times in milliseconds, in the order of the rounds; times of one round belong together.
    """
    time_once = _time_on_gpu(device) if device.type == "cuda" else _time_on_cpu
    times: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    for _ in range(rounds):
        for i in order:
            times[i].append(time_once(calls[i]))
        order.reverse()
    return times


def summarize(times: Sequence[float]) -> Measurement:
    """Returns the median and the 20th and 80th percentiles of times in milliseconds."""
    return Measurement(
        median_ms=quantile(times, 0.5), p20_ms=quantile(times, 0.2), p80_ms=quantile(times, 0.8), repeats=len(times)
    )


def quantile(values: Sequence[float], q: float) -> float:
    """Returns a quantile (`q` = 0 … 1), interpolated linearly between the closest ranks."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def _time_on_cpu(call: Call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _time_on_gpu(device: torch.device) -> Callable[[Call], float]:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def time_once(call: Call) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        with torch.cuda.device(device):
            start.record()
            call()
            end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return time_once


# What a GPU's driver says, through Triton or PyTorch, where a compiled kernel cannot be loaded or launched for want of
# memory or registers. There is no type for it; any other error of the driver leaves a process that can use it no more.
_NO_ROOM = re.compile(
    r"(?:Triton Error \[\w+\]|(CUDA|HIP)( driver)? error): .*(out of memory|too many resources requested)"
)
_NO_ROOM_FOR = {"out of memory": OutOfMemory, "too many resources requested": OutOfResources}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A schedule whose kernel gave the right results.

    Attributes:
        schedule: the schedule.
        fingerprint: the digest of its emitted source.
        call: runs its kernel on the tuning inputs.
    """

    schedule: Schedule
    fingerprint: str
    call: Callable[[], object]


def prepare(problem: Problem, schedule: Schedule, target: Target, inputs: OpInputs) -> Candidate:
    """Emits, imports and checks one schedule; running the check also warms it up.

    Raises:
        CompileError, OutOfResources, WrongResult: the candidate is out; the message says why.
    """
    source = emit(problem, schedule, target)
    kernel = compile_kernel(source)
    with launch_errors(source.backend):
        check(kernel, problem, inputs)
    arguments, options = inputs.arguments(problem.op), inputs.options(problem.op)
    return Candidate(
        schedule=schedule,
        fingerprint=source.fingerprint,
        call=lambda: kernel.entry(*arguments, **options),
    )


@contextlib.contextmanager
def launch_errors(backend: str) -> Iterator[None]:
    """Turns the errors of launches, at the first of which Triton compiles, into those of this project."""
    no_resources, no_code = _triton_errors() if backend == "triton" else ((), ())
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"not enough memory: {error}") from error
    except no_resources as error:
        raise OutOfResources(str(error)) from error
    except no_code as error:
        raise compile_error(str(error)) from error
    except RuntimeError as error:
        if not (found := _NO_ROOM.match(str(error))):
            raise
        raise _NO_ROOM_FOR[found[3]](str(error)) from error


def _triton_errors() -> tuple[tuple[type[Exception], ...], tuple[type[Exception], ...]]:
    """Returns the errors that Triton raises where a kernel does not fit, and where it cannot be compiled."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources as TritonOutOfResources
    from triton.runtime.errors import PTXASError

    return (TritonOutOfResources,), (CompilationError, PTXASError)


# These errors put a candidate out of the search and are counted by name; any other error ends the search.
FAILURES = (CompileError, OutOfResources, WrongResult, CandidateCrashed, CandidateError, TimedOut)


class Bench(Protocol):
    """The three steps of a candidate, each dearer than the one before; one that fails raises one of `FAILURES`."""

    def compile(self, schedule: Schedule) -> Resources | None:
        """Emits and compiles a candidate without running it; returns what it uses, where the compiler says so."""

    def prepare(self, schedule: Schedule) -> str:
        """Checks a candidate's results, which also warms it up; returns the fingerprint of its source."""

    def time(self, schedules: Sequence[Schedule], rounds: int, inputs: str | None = None) -> list[list[float]]:
        """Returns interleaved times of prepared candidates in milliseconds, as `measure` gives them.

        `inputs` names one of the distributions where the bench has several.
        """


class LocalBench:
    """A bench in this process: a candidate that crashes ends the process.

    Args:
        problem, target: what candidates are made for.
        device: where candidates run, as PyTorch names it.
        distribution, seed: what the inputs are drawn from, once the first candidate is prepared; `input_names` says
            what the text means.
    """

    def __init__(
        self, problem: Problem, target: Target, device: str, distribution: str = "random", seed: int = 0
    ) -> None:
        self.problem, self.target, self.device = problem, target, torch.device(device)
        self._distribution, self._seed = distribution, seed
        self._inputs: dict[str, OpInputs] = {}
        self._ready: dict[Schedule, dict[str, Candidate]] = {}

    def compile(self, schedule: Schedule) -> Resources | None:
        """Emits and compiles a candidate; for a GPU, returns what its kernels use, as the compiler tells."""
        kernel = compile_kernel(emit(self.problem, schedule, self.target))
        if kernel.source.backend != "triton":
            return None
        return Resources.of(compile_launches(kernel.module, self.target), self.target)

    def prepare(self, schedule: Schedule) -> str:
        """Checks a candidate once on all inputs, so that it stays ready; returns the fingerprint of its source."""
        if not self._inputs:
            names = input_names(self._distribution)
            self._inputs = all_inputs_of(self.problem, self.device, distributions=names, seed=self._seed)
        if schedule not in self._ready:
            self._ready[schedule] = {
                name: prepare(self.problem, schedule, self.target, inputs) for name, inputs in self._inputs.items()
            }
        return next(iter(self._ready[schedule].values())).fingerprint

    def time(self, schedules: Sequence[Schedule], rounds: int, inputs: str | None = None) -> list[list[float]]:
        """Times candidates in turns; those that another process prepared are prepared here first."""
        for schedule in schedules:
            self.prepare(schedule)
        name = inputs or next(iter(self._inputs))
        calls = [self._ready[schedule][name].call for schedule in schedules]
        with launch_errors(backend_for(self.problem, self.target)):
            return measure(calls, self.device, rounds=rounds)


class LockedBench:
    """A bench in this process that holds the device while a candidate is on it.

    Args:
        bench: the bench.
        lock: what is held.
    """

    def __init__(self, bench: Bench, lock: contextlib.AbstractContextManager[object]) -> None:
        self._bench, self._lock = bench, lock

    def compile(self, schedule: Schedule) -> Resources | None:
        """Compiles a candidate, while others may be on the device."""
        return self._bench.compile(schedule)

    def prepare(self, schedule: Schedule) -> str:
        """Checks a candidate, while nobody else is on the device; returns the fingerprint of its source."""
        with self._lock:
            return self._bench.prepare(schedule)

    def time(self, schedules: Sequence[Schedule], rounds: int, inputs: str | None = None) -> list[list[float]]:
        """Times candidates, alone on the device."""
        named = () if inputs is None else (inputs,)  # a bench that has one distribution need not know of others
        with self._lock:
            return self._bench.time(schedules, rounds, *named)


def open_bench(problem: Problem, target: Target, device: str, distribution: str, seed: int) -> LocalBench:
    """Opens a bench with as many threads as the target has cores; a worker process calls this by name."""
    if target.kind == "cpu":
        torch.set_num_threads(target.num_cores)
    return LocalBench(problem, target, device, distribution, seed)
