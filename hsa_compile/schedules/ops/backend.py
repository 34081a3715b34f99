"""What one op on one backend gives a search: which knobs there are, what they may be, what runs untuned, what it costs.

An op has a room in `schedules/ops`, with one `OpBackend` for each backend that serves it; `ops.OP_BACKENDS` is the one
table that leads there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hsa_compile.peaks import Limits
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Knob, Schedule
from hsa_compile.schedules.work import Pass, Work
from hsa_compile.target import Target

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
