"""Samplers that choose one of a finite list of points, knowing nothing but the trials of the study."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hsa_compile.autotune.point_table import Point, PointTable
from hsa_compile.errors import InvalidArgument

POINT = "hsa_compile:point"  # system attribute of a trial: the point chosen for it
_FIXED = "fixed_params"  # Optuna's, of an enqueued trial
_MAX_YIELDS = 8  # to other workers that chose the same point at the same time

_Seen = tuple[int | None, float | None]  # index of a point, and its time: NaN if it failed, None if not finished


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What a study has seen, as indices into the list of points, each once, in the order of the trials.

    Attributes:
        taken: finished, running or waiting; nobody else should try these.
        finished: those with a time or a failure.
        times: of the finished ones, NaN where the point failed.
    """

    taken: tuple[int, ...]
    finished: tuple[int, ...]
    times: tuple[float, ...]


class PointSampler(BaseSampler):
    """Chooses a point when a trial begins, keeps it in the trial, and answers each `suggest` from there.

    The distributions come too late for a relative sampler, which must give them back before the first `suggest`; so it
    is done as in Optuna's own `GridSampler`. All that a choice depends on is in the storage: a search that was killed
    goes on as if it had not been, and several workers may share a study. A point is chosen again only when all were.

    Args:
        points: all there are, each a mapping of parameter → value as `suggest` will ask for them; or their table.
        seed: equal seeds make equal choices from equal trials.
    """

    def __init__(self, points: Sequence[Point] | PointTable, *, seed: int) -> None:
        self.table = points if isinstance(points, PointTable) else PointTable(points)
        self.seed = seed
        self._finished: dict[tuple[int, int, datetime], _Seen] = {}  # read once, for they do not change

    @abstractmethod
    def choose(self, history: History, untaken: NDArray[np.bool_], rng: np.random.Generator) -> int:
        """The index of the point to try next, one of the untaken, of which there is at least one."""

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Chooses a trial's point unless it has one: enqueued, retried, or taken over from a process that died."""
        if POINT in trial.system_attrs or trial.system_attrs.get(_FIXED) or trial.params:
            return
        if list(study.directions) != [StudyDirection.MINIMIZE]:
            raise InvalidArgument(f"directions = {study.directions}; allowed is one, {StudyDirection.MINIMIZE!r}")
        refused: set[int] = set()
        for _ in range(_MAX_YIELDS):
            history = self._read(study, trial.number)
            index = self._choose(history, refused)
            study._storage.set_trial_system_attr(trial._trial_id, POINT, self.table.points[index])
            if index not in self._read(study, trial.number).taken:
                return
            refused.add(index)  # another worker wrote the same before we read again

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """None: see the class."""
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """None: see the class."""
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """One value of the trial's point.

        Raises:
            InvalidArgument: the trial was enqueued with some of its parameters only, or asks for one that the point
                does not have.
        """
        point: Mapping[str, Any] = trial.system_attrs.get(POINT, {})
        if param_name not in point:
            raise InvalidArgument(f"parameter {param_name!r} is not in the trial's point {dict(point)}")
        return point[param_name]

    def _choose(self, history: History, refused: set[int]) -> int:
        untaken = np.ones(len(self.table), dtype=bool)
        untaken[list(history.taken)] = False
        if not untaken.any():
            untaken[:] = True
        kept = untaken.copy()
        kept[list(refused)] = False
        rng = np.random.default_rng([self.seed, len(history.taken), len(refused)])
        return self.choose(history, kept if kept.any() else untaken, rng)

    def _read(self, study: optuna.Study, own_number: int) -> History:
        """The points of all other trials: a time counts more than a failure, and that more than a trial's running."""
        found: dict[int, float | None] = {}
        for trial in study._storage.get_all_trials(study._study_id, deepcopy=False):
            if trial.number == own_number:
                continue
            index, time = self._look(study, trial)
            if index is None:
                continue
            if index not in found or (time is not None and not _is_time(found[index])):
                found[index] = time
        finished = {index: time for index, time in found.items() if time is not None}
        return History(taken=tuple(found), finished=tuple(finished), times=tuple(finished.values()))

    def _look(self, study: optuna.Study, trial: FrozenTrial) -> _Seen:
        """A trial's point, also before all its parameters are suggested, and its time."""
        key = None if trial.datetime_complete is None else (study._study_id, trial._trial_id, trial.datetime_complete)
        if key is not None and key in self._finished:
            return self._finished[key]
        points = (trial.params, trial.system_attrs.get(POINT, {}), trial.system_attrs.get(_FIXED, {}))
        index = next((found for point in points if (found := self.table.find(point)) is not None), None)
        seen = index, _time_of(trial)
        if key is not None and trial.state.is_finished():
            self._finished[key] = seen
        return seen


class GridSampler(PointSampler):
    """Every point once, in an order that depends on the seed alone."""

    def choose(self, history: History, untaken: NDArray[np.bool_], rng: np.random.Generator) -> int:
        """The first untaken point of the order."""
        order = np.random.default_rng(self.seed).permutation(len(self.table))
        return int(order[untaken[order]][0])


def _time_of(trial: FrozenTrial) -> float | None:
    """A finished trial's time, NaN if it failed; None of one that is not finished.

    A pruned trial counts with the time it had then. One that failed because its process died is retried by Optuna, and
    the retry carries its point.
    """
    if not trial.state.is_finished():
        return None
    value = trial.value
    if trial.state == TrialState.PRUNED and value is None and trial.intermediate_values:
        value = trial.intermediate_values[max(trial.intermediate_values)]
    if value is None or not math.isfinite(value) or value <= 0:
        return math.nan
    return value


def _is_time(value: float | None) -> bool:
    return value is not None and not math.isnan(value)
