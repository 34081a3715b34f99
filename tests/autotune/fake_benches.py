"""Benches that worker processes open by name: times that depend on the schedule alone, and candidates that do harm."""

import ctypes
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hsa_compile.autotune.bench.bench import LocalBench, launch_errors
from hsa_compile.autotune.cost.roofline import Resources
from hsa_compile.errors import CompileError, NotFinite, WrongResult
from hsa_compile.kernels.compile import compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.kernels.hsa_attention.inputs import make_inputs
from hsa_compile.kernels.ops import check
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace, default_schedule
from hsa_compile.target import Target

LOG, SLEEP_S, BARRIER = "FAKE_BENCH_LOG", "FAKE_BENCH_SLEEP_S", "FAKE_BENCH_BARRIER"
DRIFT = (1.0, 1.5, 3.0)  # hits all calls of a round alike


def fake_time(schedule: Schedule, default: Schedule) -> float:
    """1 ms for the default, 0.5 to 1.5 for the others, drawn by what they are called."""
    return 1.0 if schedule == default else 0.5 + random.Random(str(schedule)).random()


class FakeBench:
    """Runs nothing. Logs what is compiled to a file and sleeps, if the environment says so."""

    def __init__(self, problem: Problem, target: Target, *_: Any) -> None:
        self.default = default_schedule(problem, target)
        self.failing: dict[Schedule, Exception] = {}
        self.prepared: list[Schedule] = []

    def compile(self, schedule: Schedule) -> Resources | None:
        meet_the_others("default" if schedule == self.default else "others")
        if path := os.environ.get(LOG):
            with Path(path).open("a") as file:
                file.write(f"{schedule}\n")
        time.sleep(float(os.environ.get(SLEEP_S, "0")))
        return None

    def prepare(self, schedule: Schedule) -> str:
        self.prepared.append(schedule)
        if schedule in self.failing:
            raise self.failing[schedule]
        return f"fake {schedule}"

    def time(self, schedules: Sequence[Schedule], rounds: int) -> list[list[float]]:
        drifts = [DRIFT[i % len(DRIFT)] for i in range(rounds)]
        return [[drift * self.time_of(schedule) for drift in drifts] for schedule in schedules]

    def time_of(self, schedule: Schedule) -> float:
        return fake_time(schedule, self.default)


def meet_the_others(place: str) -> None:
    """Waits until as many processes are, or were, in this place as `BARRIER` says: `COUNT DIRECTORY`."""
    if BARRIER not in os.environ:
        return
    count, directory = os.environ[BARRIER].split(" ", 1)
    met = Path(directory) / place
    met.mkdir(exist_ok=True)
    (met / str(os.getpid())).touch()
    while len(list(met.iterdir())) < int(count):
        time.sleep(0.01)


class FatalInPlayOff(FakeBench):
    """A fake bench whose process dies when the fastest candidate is timed, except in a pair, as a search does."""

    def __init__(self, problem: Problem, target: Target, *rest: Any) -> None:
        super().__init__(problem, target, *rest)
        self.fatal = min(SearchSpace.of(problem, target).schedules(), key=self.time_of)

    def time(self, schedules: Sequence[Schedule], rounds: int) -> list[list[float]]:
        if self.fatal in schedules and len(schedules) != 2:
            ctypes.string_at(0)
        return super().time(schedules, rounds)


HARM = ("segfault", "loop", "compile", "memory", "wrong", "nan", "exception")


def harmful(problem: Problem, target: Target) -> dict[Schedule, str]:
    """The first seven schedules but the default, and what each does."""
    default = default_schedule(problem, target)
    others = [s for s in SearchSpace.of(problem, target).schedules() if s != default]
    return dict(zip(others, HARM, strict=False))


class HostileBench(LocalBench):
    """A real bench, on which some candidates do harm; the others' times are made up."""

    def __init__(self, problem: Problem, target: Target, *rest: Any) -> None:
        super().__init__(problem, target, *rest)
        self.default = default_schedule(problem, target)
        self.harm = harmful(problem, target)

    def compile(self, schedule: Schedule) -> Resources | None:
        if self.harm.get(schedule) == "compile":
            spin()
        return super().compile(schedule)

    def prepare(self, schedule: Schedule) -> str:
        match self.harm.get(schedule):
            case "segfault":
                ctypes.string_at(0)
            case "loop":
                spin()
            case "memory":
                hoard = [torch.ones(128 << 20) for _ in range(10_000)]
                return str(len(hoard))
            case "wrong":
                self.check_spoilt(schedule, 1.5)
            case "nan":
                self.check_spoilt(schedule, float("nan"))
            case "exception":
                raise ZeroDivisionError("a bug in the kernel's launcher")
        return super().prepare(schedule)

    def check_spoilt(self, schedule: Schedule, factor: float) -> None:
        kernel = compile_kernel(emit(self.problem, schedule, self.target))
        spoilt = replace(kernel, entry=lambda *args, **options: kernel.entry(*args, **options) * factor)
        check(spoilt, self.problem, make_inputs(self.problem, self.device))
        raise AssertionError("a spoilt kernel passed the check")

    def time(self, schedules: Sequence[Schedule], rounds: int) -> list[list[float]]:
        assert all(schedule in self._ready for schedule in schedules)
        return [[fake_time(schedule, self.default)] * rounds for schedule in schedules]


def spin() -> None:
    while True:
        time.sleep(60)


ADVICE = """CUDA kernel errors might be asynchronously reported at some other API call.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""


def cuda_errors() -> dict[str, tuple[Exception, str]]:
    """The errors that a GPU's driver gives, through Triton or PyTorch, and what each is counted as."""
    from triton.runtime.errors import OutOfResources as TritonOutOfResources

    def pytorch(text: str) -> Exception:
        return RuntimeError(f"CUDA error: {text}\n{ADVICE}")

    return {
        "shared memory": (TritonOutOfResources(300000, 232448, "shared memory"), "OutOfResources"),
        "tensor memory": (TritonOutOfResources(1024, 512, "tensor memory"), "OutOfResources"),
        "registers": (pytorch("too many resources requested for launch"), "OutOfResources"),
        "loader": (RuntimeError("Triton Error [CUDA]: out of memory"), "OutOfMemory"),
        "allocator": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), "OutOfMemory"),
        "driver": (pytorch("out of memory"), "OutOfMemory"),
        # The process can use the device no more after these: it ends, and the next candidate gets another one.
        "illegal access": (pytorch("an illegal memory access was encountered"), "CandidateError"),
        "assertion": (pytorch("device-side assert triggered"), "CandidateError"),
        "launch failure": (RuntimeError("Triton Error [CUDA]: unspecified launch failure"), "CandidateError"),
        "no image": (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), "CandidateError"),
    }


class CudaBench(FakeBench):
    """A fake bench on which the first candidates but the default fail as kernels on a GPU do."""

    def __init__(self, problem: Problem, target: Target, *rest: Any) -> None:
        super().__init__(problem, target, *rest)
        others = (s for s in SearchSpace.of(problem, target).schedules() if s != self.default)
        self.errors = dict(zip(others, cuda_errors().values(), strict=False))
        self.poisoned = False

    def prepare(self, schedule: Schedule) -> str:
        assert not self.poisoned, "a process goes on after an error that its device does not survive"
        if schedule not in self.errors:
            return super().prepare(schedule)
        error, counted_as = self.errors[schedule]
        self.poisoned = counted_as == "CandidateError"
        with launch_errors("triton"):
            raise error


class DyingBench:
    """Does to its process what the first word of a schedule's dataflow says; for tests of the process itself."""

    def __init__(self, greeting: str) -> None:
        self.greeting = greeting

    def greet(self, name: str) -> str:
        return f"{self.greeting}, {name}, from {os.getpid()}"

    def crash(self) -> None:
        ctypes.string_at(0)

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def leave(self, code: int) -> None:
        sys.stderr.write("not the error\n")
        sys.stderr.flush()
        os._exit(code)

    def chat(self) -> str:
        print("on standard output")
        sys.stderr.write("on standard error\n")
        return "done"

    def fail(self, name: str) -> None:
        raise {
            "compile": CompileError("no such register"),
            "wrong": WrongResult("o is off"),
            "nan": NotFinite("o is not finite"),
            "memory": MemoryError("20 GiB"),
            "disk": OSError(28, "No space left on device"),
            "bug": KeyError("a bug"),
            "cuda": RuntimeError(f"CUDA error: an illegal memory access was encountered\n{ADVICE}"),
        }[name]

    def spin(self) -> None:
        spin()


def broken_bench(*_: object) -> None:
    raise RuntimeError("no bench today")


def open_fake(problem: Problem, target: Target, *rest: Any) -> FakeBench:
    """A fake bench by name."""
    return FakeBench(problem, target, *rest)
