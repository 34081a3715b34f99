"""An explanation of why a problem runs on the schedule that it runs on, and not on another tuned one."""

from dataclasses import dataclass
from typing import Any

from hsa_compile.problem import Problem
from hsa_compile.schedules.cache import ScheduleCache
from hsa_compile.schedules.key import ScheduleKey
from hsa_compile.schedules.lookup import Candidate, Lookup, fitted, regret_table
from hsa_compile.schedules.record import MEASURED, TuningRecord
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace, default_schedule
from hsa_compile.target import Target
from hsa_compile.versions import installed_versions


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A field of the key in which an entry differs from the problem.

    Attributes:
        field: the field's name.
        asked, entry: the problem's value and the entry's.
        distance: what the field adds to the distance; None if it must match.
    """

    field: str
    asked: Any
    entry: Any
    distance: float | None

    def __str__(self) -> str:
        how = "must match" if self.distance is None else f"distance {self.distance:.2f}"
        return f"{self.field} {self.entry}, here {self.asked} ({how})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """An entry that does not serve the problem, and why."""

    candidate: Candidate
    why: str
    differences: tuple[Difference, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The schedule that a problem runs on, and why.

    Attributes:
        problem, target: what was asked.
        schedule: what the problem runs on.
        found: the entry that gave it; None for the default schedule.
        how: `exact`, `nearest` or `default`.
        differences: in what the entry that serves differs from the problem.
        loss: what it is expected to lose, in words.
        rivals: all other entries, in the order in which a lookup tries them.
    """

    problem: Problem
    target: Target
    schedule: Schedule
    found: Lookup | None
    how: str
    differences: tuple[Difference, ...]
    loss: str
    rivals: tuple[Rival, ...]


def explain(cache: ScheduleCache, problem: Problem, target: Target) -> Explanation:
    """Returns what a problem would run on, and why no other entry serves it.

    Raises:
        InvalidSchedule: no schedule at all can run the problem on the target.
    """
    found = cache.lookup(problem, target)
    used: Candidate | None = None
    rivals = []
    for candidate in cache.candidates(problem, target):
        if found and used is None and candidate.record is found.record:
            used = candidate
            continue
        why = _why_not(problem, target, candidate, used)
        rivals.append(Rival(candidate=candidate, why=why, differences=_differences(problem, target, candidate)))
    return Explanation(
        problem=problem,
        target=target,
        schedule=found.schedule if found else default_schedule(problem, target),
        found=found,
        how="default" if found is None else "exact" if found.distance == 0 else "nearest",
        differences=_differences(problem, target, used) if used else (),
        loss=_loss(target, found, used),
        rivals=tuple(rivals),
    )


def _why_not(problem: Problem, target: Target, candidate: Candidate, used: Candidate | None) -> str:
    if candidate.mismatches:
        return f"must match: {', '.join(candidate.mismatches)}"
    schedule = fitted(problem, target, candidate.record, candidate.distance)
    if reason := SearchSpace.of(problem, target).why_invalid(schedule):
        return f"its schedule cannot run this problem: {reason}"
    assert used is not None
    if candidate.record.kind != used.record.kind:
        return "predicted, and a measured entry serves"
    if candidate.distance > used.distance:
        return f"farther away, {candidate.distance:.2f} rather than {used.distance:.2f}"
    return f"as near, but {candidate.origin} comes after {used.origin}"


def _differences(problem: Problem, target: Target, candidate: Candidate) -> tuple[Difference, ...]:
    asked, entry = ScheduleKey.of(problem, target), ScheduleKey.of_record(candidate.record)
    names: dict[str, float | None] = {**dict.fromkeys(candidate.mismatches), **candidate.distances}
    return tuple(
        Difference(field=name, asked=getattr(asked, name), entry=getattr(entry, name), distance=distance)
        for name, distance in names.items()
    )


def _exact_loss(record: TuningRecord) -> str:
    """Says what the winner of a search for this very shape is expected to lose."""
    reasons = []
    if record.shortfall:
        reasons.append(record.shortfall)
    elif not record.complete:
        reasons.append(f"its search is not finished after {record.trials} candidates")
    if before := record.outdated(installed_versions()):
        reasons.append(f"it was timed under {before}; hsa-compile tune --verify times it again")
    if reasons:
        return f"not known: {', and '.join(reasons)}"
    return f"none: it is the best of {record.timed} candidates that were timed for this shape"


def _loss(target: Target, found: Lookup | None, used: Candidate | None) -> str:
    if found is None or used is None:
        return "not known: nothing was measured for the default schedule"
    if found.distance == 0:
        return "by what the model is wrong" if found.is_predicted else _exact_loss(found.record)
    model = ", and by what the model is wrong" if found.is_predicted else ""
    if "device" in used.distances and used.record.kind == MEASURED:
        return f"not known: it was measured on {found.record.target.name}"
    table = regret_table(target.kind)
    if table is None:
        return f"not known: no shapes were measured against each other on a {target.kind} device"
    entry = table.at(found.distance - used.distances.get("device", 0.0))
    if entry is None:
        return f"not known: shapes were measured against each other up to distance {table.reach:g}"
    before = found.record.outdated(installed_versions())
    compiler = f", and by what has changed since {before}, under which it was timed" if before else ""
    return (
        f"{entry.mean:.1%} on average, at most {entry.p90:.1%} for nine of ten; the default schedule "
        f"{entry.default_mean:.1%} ({entry.pairs} pairs of shapes on {table.device}){model}{compiler}"
    )
