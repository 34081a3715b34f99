"""A bench: the place where candidates are compiled, checked and timed. This one is the process that asks."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from hsa_compile.autotune.cost.roofline import Resources
from hsa_compile.errors import CandidateCrashed, CandidateError, CompileError, OutOfResources, TimedOut, WrongResult
from hsa_compile.kernels.ahead_of_time import compile_launches
from hsa_compile.kernels.compile import compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.kernels.measure import measure
from hsa_compile.kernels.ops import OpInputs, check, inputs_of
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import Target

# What a GPU's driver says where a compiled kernel cannot be loaded or launched; Triton's loader has no type for it.
_NO_ROOM = re.compile(r"Triton Error \[\w+\]: .*(out of memory|too many resources requested)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A schedule whose kernel gave the right answer.

    Attributes:
        schedule: its knobs.
        fingerprint: of its emitted source.
        call: runs it on the tuning inputs.
    """

    schedule: Schedule
    fingerprint: str
    call: Callable[[], object]


def prepare(problem: Problem, schedule: Schedule, target: Target, inputs: OpInputs) -> Candidate:
    """Emits, imports and checks one schedule; running the check also warms it up.

    Raises:
        CompileError, OutOfResources, WrongResult: the candidate is out, and why.
    """
    source = emit(problem, schedule, target)
    kernel = compile_kernel(source)
    with _launch_errors(source.backend):
        check(kernel, problem, inputs)
    arguments, options = inputs.arguments(problem.op), inputs.options(problem.op)
    return Candidate(
        schedule=schedule,
        fingerprint=source.fingerprint,
        call=lambda: kernel.entry(*arguments, **options),
    )


@contextlib.contextmanager
def _launch_errors(backend: str) -> Iterator[None]:
    """Gives the errors of a first launch, at which Triton compiles, their names in this project."""
    no_resources, no_code = _triton_errors() if backend == "triton" else ((), ())
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfResources(f"not enough memory: {error}") from error
    except no_resources as error:
        raise OutOfResources(str(error)) from error
    except no_code as error:
        raise CompileError(str(error)) from error
    except RuntimeError as error:
        if not _NO_ROOM.match(str(error)):
            raise
        raise OutOfResources(str(error)) from error


def _triton_errors() -> tuple[tuple[type[Exception], ...], tuple[type[Exception], ...]]:
    """What Triton raises where a kernel does not fit, and where it cannot be compiled."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources as TritonOutOfResources
    from triton.runtime.errors import PTXASError

    return (TritonOutOfResources,), (CompilationError, PTXASError)


# What puts a candidate out of the search and is counted by name; anything else ends the search.
FAILURES = (CompileError, OutOfResources, WrongResult, CandidateCrashed, CandidateError, TimedOut)


class Bench(Protocol):
    """Three verbs, each dearer than the one before; a candidate that fails raises one of `FAILURES`."""

    def compile(self, schedule: Schedule) -> Resources | None:
        """Emits and compiles a candidate without running it; what it uses, where the compiler says so."""

    def prepare(self, schedule: Schedule) -> str:
        """Checks a candidate's results, which also warms it up; returns the fingerprint of its source."""

    def time(self, schedules: Sequence[Schedule], rounds: int) -> list[list[float]]:
        """Interleaved times of prepared candidates in milliseconds, as `measure` gives them."""


class LocalBench:
    """A bench in this process: a candidate that crashes takes the process along.

    Args:
        problem, target: what candidates are made for.
        device: where they run, as PyTorch names it.
        distribution, seed: of the inputs, which are made when the first candidate is prepared.
    """

    def __init__(
        self, problem: Problem, target: Target, device: str, distribution: str = "random", seed: int = 0
    ) -> None:
        self.problem, self.target, self.device = problem, target, torch.device(device)
        self._distribution, self._seed = distribution, seed
        self._inputs: OpInputs | None = None
        self._ready: dict[Schedule, Candidate] = {}

    def compile(self, schedule: Schedule) -> Resources | None:
        """Emits and compiles; of a GPU's kernels the compiler tells what they use."""
        kernel = compile_kernel(emit(self.problem, schedule, self.target))
        if kernel.source.backend != "triton":
            return None
        return Resources.of(compile_launches(kernel.module, self.target), self.target)

    def prepare(self, schedule: Schedule) -> str:
        """Checks a candidate once; it stays ready to be timed."""
        if self._inputs is None:
            self._inputs = inputs_of(self.problem, self.device, distribution=self._distribution, seed=self._seed)
        if schedule not in self._ready:
            self._ready[schedule] = prepare(self.problem, schedule, self.target, self._inputs)
        return self._ready[schedule].fingerprint

    def time(self, schedules: Sequence[Schedule], rounds: int) -> list[list[float]]:
        """Times candidates in turns; those that another process prepared are prepared here first."""
        for schedule in schedules:
            self.prepare(schedule)
        return measure([self._ready[schedule].call for schedule in schedules], self.device, rounds=rounds)


def open_bench(problem: Problem, target: Target, device: str, distribution: str, seed: int) -> LocalBench:
    """What a worker process opens by name: a bench with as many threads as the target has cores."""
    if target.kind == "cpu":
        torch.set_num_threads(target.num_cores)
    return LocalBench(problem, target, device, distribution, seed)
