"""A search on a recorded sweep instead of a device: seconds instead of hours, and the optimum is known."""

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.trial import TrialState

from hsa_compile.autotune.samplers.point import Point, PointTable
from hsa_compile.autotune.samplers.samplers import make_sampler
from hsa_compile.autotune.study.points import parameters_of
from hsa_compile.autotune.sweeps import RecordedSweep
from hsa_compile.errors import InvalidArgument
from hsa_compile.problem import Problem
from hsa_compile.schedules.space import default_schedule
from hsa_compile.target import Target

_MAX_IDLE_ASKS = 16  # in a row that name nothing new: then one untried point is drawn, as in a real search


class Replay:
    """A sweep made ready for many searches.

    Args:
        sweep: what stands in for the device.
        first: points that each search begins with, before the sampler is asked.
    """

    def __init__(self, sweep: RecordedSweep, first: Sequence[Point] = ()) -> None:
        self.sweep, self.first = sweep, list(first)
        self.table = PointTable(sweep.points)
        self._first = next(iter(sweep.points[0]))
        self._names: dict[Any, dict[str, None]] = {}  # value of the first parameter → the others there are then
        self._values: dict[str, dict[Any, None]] = {}
        for point in sweep.points:
            self._names.setdefault(point[self._first], {}).update(dict.fromkeys(name for name in point))
            for name, value in point.items():
                self._values.setdefault(name, {})[value] = None

    def run(self, sampler_name: str, seed: int, evaluations: int) -> list[float]:
        """One search; see `replay`."""
        if evaluations < 1:
            raise InvalidArgument(f"evaluations = {evaluations} must be at least 1")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=make_sampler(sampler_name, seed=seed, space_points=self.table))
        for point in self.first:
            study.enqueue_trial(dict(point))
        spare = list(range(len(self.table)))
        random.Random(seed).shuffle(spare)
        tried: set[int] = set()
        best: list[float] = []
        least, evaluations = math.inf, min(evaluations, len(self.table))
        while len(best) < evaluations and least > self.sweep.optimum:
            trial, index = self._next(study, tried, spare)
            tried.add(index)
            time = self.sweep.times[index]
            _tell(study, trial, time)
            least = min(least, math.inf if time is None else time)
            best.append(least)
        return best + [least] * (evaluations - len(best))

    def _next(self, study: optuna.Study, tried: set[int], spare: list[int]) -> tuple[optuna.Trial, int]:
        """A trial with a point of the sweep that was not tried."""
        for idle in itertools.count():
            if idle == _MAX_IDLE_ASKS:
                while spare[-1] in tried:
                    spare.pop()
                study.enqueue_trial(self.table.points[spare[-1]])
            trial = study.ask()
            index = self.table.find(self._suggest(trial))
            if index is not None and index not in tried:
                return trial, index
            _tell(study, trial, None if index is None else self.sweep.times[index])
        raise AssertionError("a point that was enqueued is new")

    def _suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        point = {self._first: trial.suggest_categorical(self._first, list(self._values[self._first]))}
        for name in self._names[point[self._first]]:
            point[name] = trial.suggest_categorical(name, list(self._values[name]))
        return point


def replay(sweep: RecordedSweep, sampler_name: str, seed: int, evaluations: int) -> list[float]:
    """The least time after each evaluation, infinite until one succeeds.

    As in a real search, a point that failed costs an evaluation; one that is not in the sweep, or was tried before,
    goes straight back to the sampler at no cost. What would come after the optimum is not played.

    Args:
        sweep: what stands in for the device.
        sampler_name: one of `choices.SAMPLERS`.
        seed: of the sampler.
        evaluations: how many; fewer come back where the sweep has fewer points.

    Raises:
        InvalidArgument: fewer than one evaluation, or no such sampler.
    """
    return Replay(sweep).run(sampler_name, seed, evaluations)


def first_points(sweep: RecordedSweep) -> list[Point]:
    """What our search begins with on an empty cache: the default of the sweep's problem. Nothing for others' sweeps."""
    if not {"problem", "target"} <= sweep.about.keys():
        return []
    problem, target = Problem(**sweep.about["problem"]), Target(**sweep.about["target"])
    return [parameters_of(default_schedule(problem, target))]


def _tell(study: optuna.Study, trial: optuna.Trial, time: float | None) -> None:
    study.tell(trial, time, state=TrialState.FAIL if time is None else TrialState.COMPLETE)
