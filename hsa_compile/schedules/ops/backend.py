"""The form in which an op describes its schedules on one backend: `OpBackend`, and the costs that it is built from.

It says which knobs there are, what values they may take, which schedules run untuned, and what a schedule costs. Each
op has a module or folder in `schedules/ops` with one `OpBackend` for each backend that serves it; the table
`ops.OP_BACKENDS` leads there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hsa_compile.peaks import Limits
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Knob, Schedule
from hsa_compile.target import Target

# The share of picks that neighbouring tokens have in common, between `random` and `trained`; `union` saves by it.
OVERLAP = 0.5

Knobs = Mapping[str, tuple[Knob, ...]]
Choices = Mapping[str, Knobs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The FLOPs and bytes of one op on one problem under a schedule.

    Attributes:
        flops: the FLOPs of all matrix products, padding not counted.
        memory_bytes: the bytes of every tensor, counted once, as if the cache held it afterwards.
        cache_bytes: the bytes that the programs read and write, wherever they come from.
    """

    flops: float
    memory_bytes: float
    cache_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One kernel of an op and its work, padding included.

    Attributes:
        flops: the FLOPs of its matrix products.
        cache_bytes, memory_bytes: the bytes that it moves through the shared cache, and beyond it.
        programs: how many programs one launch has.
        launches: how often the kernel is launched.
        rows: how many rows a tile has.
        warps, stages: how many warps, and stages of its pipeline, a program has.
    """

    flops: float
    cache_bytes: float
    memory_bytes: float
    programs: float
    launches: int
    rows: int
    warps: int
    stages: int


def clocks(work: Work, itemsize: int, limits: Limits) -> dict[str, float]:
    """Returns the milliseconds that each part of a device (`matrix`, `memory`, `cache`) needs at its peak.

    The slowest is a lower bound of the time.

    Args:
        work: what one or several ops do.
        itemsize: bytes of an element, which decides between the peaks of products.
        limits: the peaks of the device.
    """
    peak = limits.float32_tflops if itemsize == 4 else limits.tflops
    return {
        "matrix": work.flops / (peak * 1e9),
        "memory": work.memory_bytes / (limits.memory_gb_s * 1e6),
        "cache": work.cache_bytes / (limits.cache_gb_s * 1e6),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class OpBackend:
    """The schedules of one op on one backend.

    Attributes:
        name: the backend: `triton`, `cpp` or `torch`.
        choices: dataflow → knob → allowed values, in a fixed order.
        why_not: gives the first reason why a schedule made of these choices cannot run a problem on a target, or None.
        fit: makes a schedule that was tuned for another size usable for a problem: knobs that count tokens or slots
            are cut to what the problem has.
        defaults: gives the schedules to run untuned, the best first.
        work: gives the FLOPs and bytes of a problem under a schedule.
        passes: gives the kernels of a schedule one by one, for the finer cost model; None where there is no such model.
    """

    name: str
    choices: Choices
    why_not: Callable[[Problem, Schedule, Target], str | None]
    fit: Callable[[Problem, Schedule], Schedule]
    defaults: Callable[[Problem, Target], list[Schedule]]
    work: Callable[[Problem, Schedule], Work]
    passes: Callable[[Problem, Schedule, Limits], list[Pass]] | None = None


def keep(problem: Problem, schedule: Schedule) -> Schedule:
    """Returns the schedule as it is: the `fit` of schedules whose knobs do not depend on a problem's size."""
    return schedule


def largest_choice(choices: tuple[Knob, ...], wanted: int, limit: int) -> int:
    """Returns the largest choice that is at most `wanted` and `limit`; if there is none, the first, the smallest."""
    numbers = [int(choice) for choice in choices]
    return max((number for number in numbers if number <= min(limit, wanted)), default=numbers[0])
