"""What one op on one backend gives a search: which knobs there are, what they may be, what runs untuned, what it costs.

An op has a room in `schedules/ops`, with one `OpBackend` for each backend that serves it; `ops.OP_BACKENDS` is the one
table that leads there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hsa_compile.peaks import Limits
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Knob, Schedule
from hsa_compile.target import Target

OVERLAP = 0.8  # of the picks of neighbouring tokens, as in the `local` inputs; what `union` saves hangs on it


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one op on one problem does under a schedule.

    Attributes:
        flops: of all matrix products, padding not counted.
        memory_bytes: every tensor once, as if the cache held the rest.
        cache_bytes: what the programs read and write, from wherever it comes.
    """

    flops: float
    memory_bytes: float
    cache_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One kernel of an op and its work, padding included.

    Attributes:
        flops: of its matrix products.
        cache_bytes, memory_bytes: what it moves, through the shared cache and beyond it.
        programs: of one launch.
        launches: how often it is launched.
        rows: of a tile.
        warps, stages: of a program.
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
    """Milliseconds that each part of a device needs at its peak: `matrix`, `memory`, `cache`; the slowest is a bound.

    Args:
        work: of one or several ops.
        itemsize: bytes of an element, which decides between the peaks of products.
        limits: of the device.
    """
    peak = limits.float32_tflops if itemsize == 4 else limits.tflops
    return {
        "matrix": work.flops / (peak * 1e9),
        "memory": work.memory_bytes / (limits.memory_gb_s * 1e6),
        "cache": work.cache_bytes / (limits.cache_gb_s * 1e6),
    }


Knobs = Mapping[str, tuple[Knob, ...]]
Choices = Mapping[str, Knobs]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpBackend:
    """The schedules of one op on one backend.

    Attributes:
        name: the backend, `triton`, `cpp` or `torch`.
        choices: dataflow → knob → allowed values, in a fixed order.
        why_not: the first reason why a schedule made of these choices cannot run a problem on a target, or None.
        fit: makes a schedule that was tuned for another size usable for a problem: knobs that count tokens or slots
            are cut to what the problem has.
        defaults: schedules to run untuned, the best first.
        work: FLOPs and bytes of a problem under a schedule.
        passes: the kernels of a schedule one by one, for the finer cost model; None where an op has no such model.
    """

    name: str
    choices: Choices
    why_not: Callable[[Problem, Schedule, Target], str | None]
    fit: Callable[[Problem, Schedule], Schedule]
    defaults: Callable[[Problem, Target], list[Schedule]]
    work: Callable[[Problem, Schedule], Work]
    passes: Callable[[Problem, Schedule, Limits], list[Pass]] | None = None


def keep(problem: Problem, schedule: Schedule) -> Schedule:
    """The `fit` of schedules whose knobs do not depend on a problem's size."""
    return schedule


def largest_choice(choices: tuple[Knob, ...], wanted: int, limit: int) -> int:
    """`wanted`, or the largest choice that is within the limit, or the smallest choice there is."""
    numbers = [int(choice) for choice in choices]
    return max((number for number in numbers if number <= min(limit, wanted)), default=numbers[0])
