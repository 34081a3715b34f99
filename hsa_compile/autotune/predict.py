"""What a kernel should cost on a device that may not be there: time by roofline, and how full its processors are."""

from dataclasses import dataclass

from hsa_compile.kernels.ahead_of_time import KernelResources
from hsa_compile.peaks import limits_of
from hsa_compile.problem import Problem
from hsa_compile.schedules.work import Work, clocks
from hsa_compile.target import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The roofline: the slowest of three clocks, and which it is (`matrix`, `memory` or `cache`)."""

    time_ms: float
    bound: str


def predict(problem: Problem, work: Work, target: Target) -> Prediction:
    """The time that the busiest part of the device needs at its peak: a lower bound, good for comparing.

    Raises:
        InvalidTarget: the architecture's peaks are not known.
    """
    times = clocks(work, problem.itemsize, limits_of(target))
    bound = max(times, key=lambda name: times[name])
    return Prediction(time_ms=times[bound], bound=bound)


def occupancy(resources: KernelResources, target: Target) -> float:
    """Share of a multiprocessor's threads that resident programs of a kernel fill, 0 … 1."""
    threads = resources.num_warps * target.warp_size
    return resident_programs(resources, target) * threads / limits_of(target).threads


def resident_programs(resources: KernelResources, target: Target) -> int:
    """Programs of a kernel that one multiprocessor holds at once."""
    limits = limits_of(target)
    threads = resources.num_warps * target.warp_size
    registers = -(-max(resources.registers, 1) // limits.register_unit) * limits.register_unit
    return min(
        limits.programs,
        limits.threads // threads,
        limits.registers // (registers * threads),
        limits.shared_memory // max(resources.shared_memory + 1024, 1),
    )
