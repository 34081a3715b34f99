"""The cost model of GPU kernels: a roofline (`predict`), a finer one that ranks schedules (`estimate`), and occupancy.

The finer model tells schedules of one dataflow apart. It takes into account the padding of tiles, traffic that the
shared cache does not hold, how sums come together, the last wave of programs, and, once a candidate is compiled, its
matrix instructions and the warps that hide latency. `Resources` says what a compiled candidate uses.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hsa_compile.checks import check_count, check_number
from hsa_compile.kernels.ahead_of_time import KernelResources
from hsa_compile.peaks import LIMITS, limits_of
from hsa_compile.problem import Problem
from hsa_compile.schedules.ops.backend import Pass, Work, clocks
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.target import Target

MAX_MORE_SPILLS = 128  # bytes that a candidate's thread may spill beyond those of the default

# The shares of the peaks that good kernels of this kind reach.
_MATRIX_SHARE, _BANDWIDTH_SHARE = 0.6, 0.8
_NORM = 3  # clocks overlap, though not wholly: their norm lies between the largest and the sum
_LAUNCH_MS, _LISTS_MS = 0.016, 0.03  # the time to launch a kernel, and to make the chunks' lists
_HIDING_WARPS = 12  # resident warps that hide the latency of memory; each further pipeline stage counts half as much
_MIN_ROWS = 16  # the fewest rows that a matrix instruction takes
# The matrix instruction of each architecture, and the shares of its peak that older ones reach, and code without any.
_NEWEST = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "MFMA"}
_OLDER_SHARE, _NO_MATRIX_SHARE = 0.5, 0.06
_WIDE_ROWS = {"sm_90": 64, "sm_100": 128}  # with fewer rows, Triton takes the older instruction


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The time that a roofline gives, and the part of the device that bounds it: `matrix`, `memory` or `cache`."""

    time_ms: float
    bound: str


def predict(problem: Problem, work: Work, target: Target) -> Prediction:
    """Returns the time that the busiest part of the device needs at its peak: a lower bound, good for comparing.

    Raises:
        InvalidTarget: the architecture's peaks are not known.
    """
    times = clocks(work, problem.itemsize, limits_of(target))
    bound = max(times, key=lambda name: times[name])
    return Prediction(time_ms=times[bound], bound=bound)


def occupancy(resources: KernelResources, target: Target) -> float:
    """Returns the share of a multiprocessor's threads that resident programs of a kernel fill, 0 … 1."""
    threads = resources.num_warps * target.warp_size
    return resident_programs(resources, target) * threads / limits_of(target).threads


def resident_programs(resources: KernelResources, target: Target) -> int:
    """Returns how many programs of a kernel one multiprocessor holds at once."""
    limits = limits_of(target)
    threads = resources.num_warps * target.warp_size
    registers = -(-max(resources.registers, 1) // limits.register_unit) * limits.register_unit
    return min(
        limits.programs,
        limits.threads // threads,
        limits.registers // (registers * threads),
        limits.shared_memory // max(resources.shared_memory + 1024, 1),
    )


def estimate(problem: Problem, schedule: Schedule, target: Target, kernels: Sequence[KernelResources] = ()) -> float:
    """Returns the milliseconds that a schedule should take; such times are for ranking.

    Args:
        problem, schedule, target: what runs, how, and where.
        kernels: what the schedule's kernels use, in the order in which they run, if they were compiled.

    Raises:
        InvalidTarget: the target's peaks are not known.
    """
    space, limits = SearchSpace.of(problem, target), limits_of(target)
    if space.op_backend.passes is None:
        return predict(problem, space.work(schedule), target).time_ms
    main = [kernel for kernel in kernels if kernel.name.startswith("_hsa_")]  # the others sort picks and add up
    time_ms = 0.0
    for number, one in enumerate(space.op_backend.passes(problem, schedule, limits)):
        # The first pass is the first kernel; a second pass in two kernels is as slow as the worse.
        own = main[number:] if number else main[:1]
        time_ms += max((_time(problem, one, target, kernel) for kernel in own), default=_time(problem, one, target))
    return time_ms + (_LISTS_MS if "block_tokens" in schedule else 0.0)


def _time(problem: Problem, one: Pass, target: Target, kernel: KernelResources | None = None) -> float:
    limits = limits_of(target)
    peak = limits.float32_tflops if problem.itemsize == 4 else limits.tflops
    matrix = one.flops / (peak * 1e9 * _MATRIX_SHARE * _matrix_share(problem, one, target, kernel))
    resident = max(1, resident_programs(kernel, target)) if kernel else 2
    hiding = 1.0
    if kernel:
        warps = resident * kernel.num_warps * (1 + 0.5 * (one.stages - 1))
        hiding = min(1.0, math.sqrt(warps / _HIDING_WARPS))
    cache = one.cache_bytes / (limits.cache_gb_s * 1e6 * _BANDWIDTH_SHARE)
    memory = one.memory_bytes / (limits.memory_gb_s * 1e6 * _BANDWIDTH_SHARE)
    clocks = (matrix**_NORM + cache**_NORM + memory**_NORM) ** (1 / _NORM) / hiding
    waves = one.programs / (target.num_cores * resident)
    return clocks * math.ceil(waves) / waves + one.launches * _LAUNCH_MS


def _matrix_share(problem: Problem, one: Pass, target: Target, kernel: KernelResources | None) -> float:
    if problem.itemsize == 4:
        return 1.0
    newest = _NEWEST.get(target.arch)
    if kernel is None:
        wide = one.rows >= _WIDE_ROWS.get(target.arch, _MIN_ROWS) and one.warps >= 4
        # A forward tile of 64 rows keeps four warps busy; backward, more warps share its many accumulators.
        idle = max(1.0, 16 * one.warps / max(one.rows, 64)) if problem.op == "hsa_forward" else 1.0
        return (1.0 if wide else _OLDER_SHARE) / idle
    if kernel.matrix_instruction == "none":
        return _NO_MATRIX_SHARE
    return 1.0 if kernel.matrix_instruction == newest else _OLDER_SHARE


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a compiled candidate uses of a GPU: the spills of all its kernels, and else what its worst kernel does.

    Attributes:
        spills: the bytes of a thread's registers that live in memory.
        registers: how many registers a thread has.
        shared_memory: the bytes of shared memory that a program has.
        occupancy: the share of a multiprocessor's threads that are resident, 0 … 1; None if its limits are not known.
    """

    spills: int = 0
    registers: int = 0
    shared_memory: int = 0
    occupancy: float | None = None

    def __post_init__(self) -> None:
        for name in ("spills", "registers", "shared_memory"):
            check_count(name, getattr(self, name), 0, 2**40)
        if self.occupancy is not None:
            check_number("occupancy", self.occupancy, 0, 1)

    @staticmethod
    def of(kernels: Sequence[KernelResources], target: Target) -> "Resources":
        """Sums spills, and takes the largest of registers and shared memory and the least occupancy."""
        known = target.arch in LIMITS
        return Resources(
            spills=sum(kernel.spills for kernel in kernels),
            registers=max(kernel.registers for kernel in kernels),
            shared_memory=max(kernel.shared_memory for kernel in kernels),
            occupancy=min(occupancy(kernel, target) for kernel in kernels) if known else None,
        )

    def why_hopeless(self, default: "Resources") -> str | None:
        """Returns why a candidate that uses this need not be run, or None if it may be good."""
        if self.spills > default.spills + MAX_MORE_SPILLS:
            return f"it spills {self.spills} bytes of a thread, the default {default.spills}"
        if self.occupancy == 0:
            return "not one program of it fits on a multiprocessor"
        return None
