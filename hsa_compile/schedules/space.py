"""The schedules that there are for a problem on a target, and which of them are valid: the only set of constraints."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from hsa_compile.checks import shown
from hsa_compile.errors import InvalidSchedule
from hsa_compile.problem import Problem
from hsa_compile.schedules.ops import op_backend
from hsa_compile.schedules.ops.backend import Choices, OpBackend, Work
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """The schedules of one problem on one target.

    Attributes:
        problem, target: what the schedules are for.
        op_backend: what the problem's op offers on the backend that serves it.
    """

    problem: Problem
    target: Target
    op_backend: OpBackend

    @staticmethod
    def of(problem: Problem, target: Target) -> "SearchSpace":
        """Returns the space of a problem on a target."""
        return SearchSpace(problem=problem, target=target, op_backend=op_backend(problem, target))

    @property
    def backend(self) -> str:
        """What the kernels are written in: `triton`, `cpp` or `torch`."""
        return self.op_backend.name

    @property
    def choices(self) -> Choices:
        """Dataflow → knob → allowed values, in a fixed order."""
        return self.op_backend.choices

    def is_valid(self, schedule: Schedule) -> bool:
        """Returns whether the schedule can run the problem on the target."""
        return self.why_invalid(schedule) is None

    def why_invalid(self, schedule: Schedule) -> str | None:
        """Returns the first reason why the schedule cannot run the problem on the target, or None if it can."""
        return self._why_unknown(schedule) or self.op_backend.why_not(self.problem, schedule, self.target)

    def fit(self, schedule: Schedule) -> Schedule:
        """Returns a schedule tuned for another size, its knobs that count tokens or slots cut to this problem's."""
        return schedule if self._why_unknown(schedule) else self.op_backend.fit(self.problem, schedule)

    def schedules(self) -> Iterator[Schedule]:
        """Yields all valid schedules, in a fixed order."""
        for dataflow, knobs in self.choices.items():
            for values in itertools.product(*knobs.values()):
                schedule = Schedule.of(dataflow, **dict(zip(knobs, values, strict=True)))
                if self.is_valid(schedule):
                    yield schedule

    def default(self) -> Schedule:
        """Returns a schedule that is valid, and good on any device of its kind: a rule finds it, without measuring.

        Raises:
            InvalidSchedule: no schedule at all can run the problem on the target; the message says why.
        """
        preferences = self.op_backend.defaults(self.problem, self.target)
        for candidate in itertools.chain(preferences, self.schedules()):
            if self.is_valid(candidate):
                return candidate
        raise InvalidSchedule(
            f"no schedule can run {self.problem.describe()} on {self.target.arch}: {self.why_invalid(preferences[0])}"
        )

    def work(self, schedule: Schedule) -> Work:
        """Returns the FLOPs and bytes of the problem under the schedule."""
        return self.op_backend.work(self.problem, schedule)

    def _why_unknown(self, schedule: Schedule) -> str | None:
        if schedule.dataflow not in self.choices:
            return f"dataflow = {shown(schedule.dataflow)} is not one of {', '.join(self.choices)}"
        knobs = self.choices[schedule.dataflow]
        given = [name for name in schedule if name != "dataflow"]
        if set(given) != set(knobs):
            return f"the knobs of dataflow {schedule.dataflow} are {', '.join(knobs)}, not {', '.join(given) or 'none'}"
        for name, allowed in knobs.items():
            if not any(type(schedule[name]) is type(value) and schedule[name] == value for value in allowed):
                return f"{name} = {shown(schedule[name])} is not one of {', '.join(map(str, allowed))}"
        return None


def default_schedule(problem: Problem, target: Target) -> Schedule:
    """Returns the schedule that runs untuned and that every search tries first (`SearchSpace.default`)."""
    return SearchSpace.of(problem, target).default()
