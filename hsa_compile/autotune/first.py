"""What a search tries before it samples: the default, what others found for such problems, what the model likes."""

from collections.abc import Iterator, Sequence

from hsa_compile.autotune.kernel_model import estimate
from hsa_compile.peaks import LIMITS
from hsa_compile.problem import Problem
from hsa_compile.schedules.cache import default_cache
from hsa_compile.schedules.key import ScheduleKey
from hsa_compile.schedules.ops import backend_for
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace, default_schedule
from hsa_compile.target import Target

MAX_NEIGHBOURS = 3  # winners of other problems and devices


def first_schedules(problem: Problem, target: Target) -> list[Schedule]:
    """The default, the nearest tuned problem's, other winners by distance, and the one predicted to be fastest."""
    found = [default_schedule(problem, target), *_neighbours(problem, target), *_predicted_best(problem, target)]
    return list(dict.fromkeys(found))


def predicted_times(problem: Problem, schedules: Sequence[Schedule], target: Target) -> list[float] | None:
    """What the model predicts for each, in milliseconds; None where it does not know the target's peaks."""
    if target.arch not in LIMITS:
        return None
    return [estimate(problem, schedule, target) for schedule in schedules]


def _neighbours(problem: Problem, target: Target) -> Iterator[Schedule]:
    """What lookup would use, then winners for the same op and template, of other devices, too."""
    cache, space = default_cache(), SearchSpace.of(problem, target)
    if found := cache.lookup(problem, target):
        yield found.schedule
    template, key = backend_for(problem, target), ScheduleKey.of(problem, target)
    records = [
        record
        for _, record in cache.entries()
        if record.problem.op == problem.op and backend_for(record.problem, record.target) == template
    ]
    records.sort(key=lambda record: _far(key, ScheduleKey.of(record.problem, record.target)))
    fitting = (space.fit(record.schedule) for record in records)
    valid = dict.fromkeys(schedule for schedule in fitting if space.is_valid(schedule))
    yield from list(valid)[:MAX_NEIGHBOURS]


def _far(key: ScheduleKey, other: ScheduleKey) -> tuple[int, float]:
    """Fields that differ where they should not, then the distance in the others."""
    return len(key.mismatches(other)), key.distance(other)


def _predicted_best(problem: Problem, target: Target) -> Iterator[Schedule]:
    valid = list(SearchSpace.of(problem, target).schedules())
    if (times := predicted_times(problem, valid, target)) is not None:
        yield valid[times.index(min(times))]
