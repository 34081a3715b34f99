"""A schedule: the values of one kernel's knobs, which tuning chooses."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hsa_compile.checks import check_count, check_text, shown
from hsa_compile.errors import InvalidSchedule

Knob = int | str | bool
MAX_KNOB = 2**40


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule(Mapping[str, Knob]):
    """The values of one kernel's knobs, the dataflow first: `schedule["dataflow"]`, `schedule["num_warps"]`.

    `SearchSpace` says which knobs there are and which values each may take. The values cannot be changed; two
    schedules with the same knobs are equal and hash alike.

    Attributes:
        dataflow: what one program of the kernel owns, such as a `token` or a `chunk`.
        knobs: the other knobs, sorted by name.
    """

    dataflow: str
    knobs: tuple[tuple[str, Knob], ...] = field(default=())

    def __post_init__(self) -> None:
        names = [name for name, _ in self.knobs]
        if len(set(names)) != len(names) or "dataflow" in names:
            raise InvalidSchedule(f"knobs {names} must be named once each, and 'dataflow' given apart")
        object.__setattr__(self, "knobs", tuple(sorted(self.knobs)))

    @staticmethod
    def of(dataflow: str, **knobs: Knob) -> "Schedule":
        """Returns a schedule from keyword arguments."""
        return Schedule(dataflow=dataflow, knobs=tuple(knobs.items()))

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Schedule":
        """Returns the schedule of a flat mapping, as `dict(schedule)` gives it.

        Raises:
            InvalidSchedule: there is no dataflow, or a value is no integer in bounds, boolean or printable string.
        """
        if not isinstance(values, Mapping):
            raise InvalidSchedule(f"a schedule is a mapping of knobs to values, not {shown(values)}")
        knobs = dict(values)
        dataflow = knobs.pop("dataflow", None)
        if not isinstance(dataflow, str):
            raise InvalidSchedule(f"dataflow = {shown(dataflow)} must be a string")
        for name, value in (("dataflow", dataflow), *knobs.items()):
            check_text("the name of a knob", name, error=InvalidSchedule)
            if isinstance(value, str):
                check_text(name, value, error=InvalidSchedule)
            elif not isinstance(value, bool):
                check_count(name, value, -MAX_KNOB, MAX_KNOB, error=InvalidSchedule)
        return Schedule.of(dataflow, **knobs)

    @staticmethod
    def parse(text: str) -> "Schedule":
        """Returns the schedule that a text such as `chunk block_tokens=4 num_warps=8`, as `str` prints it, stands for.

        Raises:
            InvalidSchedule: a word after the first is not of the form `name=value`, or a name is given twice.
        """
        dataflow, *words = text.split() or [""]
        knobs: list[tuple[str, Knob]] = []
        for word in words:
            name, equals, value = word.partition("=")
            if not (name and equals and value):
                raise InvalidSchedule(f"{word!r} in schedule {text!r} is not of the form name=value")
            knobs.append((name, int(value) if re.fullmatch(r"-?[0-9]{1,18}", value) else value))
        return Schedule(dataflow=dataflow, knobs=tuple(knobs))

    def __getitem__(self, name: str) -> Knob:
        if name == "dataflow":
            return self.dataflow
        for knob, value in self.knobs:
            if knob == name:
                return value
        raise KeyError(name)

    def number(self, name: str) -> int:
        """Returns the value of a knob that counts something."""
        value = self[name]
        assert isinstance(value, int)
        return value

    def __iter__(self) -> Iterator[str]:
        yield "dataflow"
        for name, _ in self.knobs:
            yield name

    def __len__(self) -> int:
        return 1 + len(self.knobs)

    def __str__(self) -> str:
        return " ".join([self.dataflow, *(f"{name}={value}" for name, value in self.knobs)])
