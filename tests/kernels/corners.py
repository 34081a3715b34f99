"""The schedules that tests choose out of the space of the target they run for, whichever that is."""

from hsa_compile import Problem, Schedule, SearchSpace, Target


def corners(problem: Problem, target: Target) -> list[Schedule]:
    """The first and the last valid schedule of each dataflow: all of the smallest tiles, and of the largest."""
    by_dataflow: dict[str, list[Schedule]] = {}
    for schedule in SearchSpace.of(problem, target).schedules(problem, target):
        by_dataflow.setdefault(schedule.dataflow, []).append(schedule)
    return list(dict.fromkeys(corner for listed in by_dataflow.values() for corner in (listed[0], listed[-1])))
