"""The lookup of a tuned schedule: which entries can serve a problem, in which order, and what the first should lose.

The loss, or regret, of a schedule that was tuned for another shape is read from a table that ships with the package.
"""

import functools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from hsa_compile.errors import InvalidArgument
from hsa_compile.paths import REGRET_FILE
from hsa_compile.problem import Problem
from hsa_compile.schedules.key import ScheduleKey
from hsa_compile.schedules.record import MEASURED, PREDICTED, TuningRecord
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.target import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class RegretBin:
    """What is known about pairs of shapes whose distance is at most a bound, and more than that of the bin before.

    Attributes:
        up_to: the largest distance of the keys.
        pairs: how many there were.
        mean, p90: the share of time lost by taking the other shape's winner instead of one's own; 0.03 is 3 %.
        default_mean: the mean share lost by the default schedule on the same shapes.
    """

    up_to: float
    pairs: int
    mean: float
    p90: float
    default_mean: float

    def __post_init__(self) -> None:
        for spec in fields(self):
            if not math.isfinite(getattr(self, spec.name)):
                raise InvalidArgument(f"{spec.name} = {getattr(self, spec.name)!r} must be a finite number")


@dataclass(frozen=True, slots=True, kw_only=True)
class RegretTable:
    """The regret by distance, as measured on one device and taken for all devices of its kind.

    Attributes:
        device: where it was measured.
        shapes: how many problems were tuned.
        bins: the bins, by growing distance.
    """

    device: str
    shapes: int
    bins: tuple[RegretBin, ...]

    @property
    def reach(self) -> float:
        """The largest distance about which anything is known."""
        return self.bins[-1].up_to

    def at(self, distance: float) -> RegretBin | None:
        """Returns the bin of a distance; None beyond the last."""
        return next((entry for entry in self.bins if distance <= entry.up_to), None)


@functools.cache
def regret_table(kind: str) -> RegretTable | None:
    """Returns the table for a kind of device (`cpu`, `cuda`, `hip`), or None if none was measured."""
    if not REGRET_FILE.exists():
        return None
    tables: Mapping[str, Any] = json.loads(REGRET_FILE.read_text(encoding="utf-8"))
    if kind not in tables:
        return None
    table = tables[kind]
    bins = tuple(RegretBin(**entry) for entry in table["bins"])
    return RegretTable(device=table["device"], shapes=table["shapes"], bins=bins)


def expected_regret(kind: str, distance: float) -> float | None:
    """Returns the share of time that a schedule tuned at such a distance should lose; None where nobody measured it."""
    if distance == 0:
        return 0.0
    table = regret_table(kind)
    found = table.at(distance) if table else None
    return found.mean if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """A tuned schedule for a problem, and where it comes from.

    Attributes:
        schedule: valid for the problem that was asked for.
        record: the entry that it was taken from.
        origin: `user` or `pretuned`.
        distance: how far the entry's key is from the problem's; 0 is an exact hit.
        regret: share of time that it is expected to lose against the shape's own winner, 0.03 for 3 %; None where
            nobody measured it: farther than any measured pair of shapes, or from another device. A predicted entry
            is compared with what would be predicted for the shape itself.
    """

    schedule: Schedule
    record: TuningRecord
    origin: str
    distance: float
    regret: float | None

    @property
    def is_predicted(self) -> bool:
        """Whether a model chose the schedule, and no measurement."""
        return self.record.kind == PREDICTED


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An entry compared with a problem: what must match and does not, and how far it is in what need not match.

    Attributes:
        record, origin: the entry, and where it comes from: `user` or `pretuned`.
        mismatches: fields of the key that must match and differ.
        distances: how far each other field that differs takes the two apart.
    """

    record: TuningRecord
    origin: str
    mismatches: tuple[str, ...]
    distances: dict[str, float]

    @property
    def distance(self) -> float:
        """How far the entry's key is from the problem's."""
        return sum(self.distances.values())

    @property
    def rank(self) -> tuple[int, bool, float]:
        """What candidates are sorted by: those that may serve come first, then measured ones, then near ones."""
        return len(self.mismatches), self.record.kind == PREDICTED, self.distance


def candidates(
    problem: Problem, target: Target, entries: Iterable[tuple[str, ScheduleKey, TuningRecord]], *, serving: bool
) -> list[Candidate]:
    """Returns entries in the order in which a lookup tries them; at equal rank in the order given.

    Args:
        entries: (origin, key, record) for each.
        serving: whether to leave out those that differ in what must match; else they come last, the likest first.
    """
    key = ScheduleKey.of(problem, target)
    found = []
    for origin, other, record in entries:
        mismatches = tuple(key.mismatches(other))
        if not (serving and mismatches):
            distances = key.distances(other)
            found.append(Candidate(record=record, origin=origin, mismatches=mismatches, distances=distances))
    return sorted(found, key=lambda candidate: candidate.rank)


def use(problem: Problem, target: Target, candidate: Candidate) -> Lookup | None:
    """Returns the answer that a candidate gives, or None if its schedule cannot run the problem."""
    schedule = fitted(problem, target, candidate.record, candidate.distance)
    if not SearchSpace.of(problem, target).is_valid(schedule):
        return None
    return Lookup(
        schedule=schedule,
        record=candidate.record,
        origin=candidate.origin,
        distance=candidate.distance,
        regret=regret_of(target, candidate),
    )


def fitted(problem: Problem, target: Target, record: TuningRecord, distance: float) -> Schedule:
    """Returns a record's schedule, cut to a problem of another size; it is not always valid."""
    return SearchSpace.of(problem, target).fit(record.schedule) if distance else record.schedule


def regret_of(target: Target, candidate: Candidate) -> float | None:
    """Returns what a candidate is expected to lose, as in `Lookup.regret`."""
    if "device" in candidate.distances and candidate.record.kind == MEASURED:
        return None
    # A prediction is made for an architecture, not for a product.
    return expected_regret(target.kind, candidate.distance - candidate.distances.get("device", 0.0))
