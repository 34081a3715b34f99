"""Samplers that choose from a finite list of points: the list, their base class, a grid, and schedules as points.

They know nothing but the trials of the study.
"""

import math
from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hsa_compile.errors import InvalidArgument
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace

Point = Mapping[str, Any]
POINT = "hsa_compile:point"  # system attribute of a trial: the point chosen for it
_FIXED = "fixed_params"  # Optuna's system attribute of an enqueued trial: its parameters
_MAX_YIELDS = 8  # how often a worker yields to others that chose the same point at the same time

_Seen = tuple[int | None, float | None]  # index of a point, and its time: NaN if it failed, None if not finished


class PointTable:
    """A finite list of points, each a mapping of parameter → value; a point need not have every parameter.

    Args:
        points: the points, at least one; no two are alike.

    Attributes:
        points: as given.
        codes: `[num_points, num_parameters]`, which value of a parameter a point has, counted in order of size; a
            missing parameter is a value, too. Parameters with one value are left out.
        features: `[num_points, num_features]`, each from 0 to 1, for a model to learn from: the codes of numbers, a
            column for each value of anything else, and how often an integer can be halved, since kernels like 96
            better than 97.

    Raises:
        InvalidArgument: there is no point, or one is given twice.
    """

    def __init__(self, points: Sequence[Point]) -> None:
        self.points = [dict(point) for point in points]
        self._index = {point_key(point): index for index, point in enumerate(self.points)}
        if not self.points or len(self._index) < len(self.points):
            repeated = len(self.points) - len(self._index)
            raise InvalidArgument(f"{len(self.points)} points of which {repeated} repeat; allowed: 1 or more, all new")
        names = dict.fromkeys(name for point in self.points for name in point)
        columns = [[point.get(name) for point in self.points] for name in names]
        columns = [column for column in columns if len(set(map(_typed, column))) > 1]
        ordered = [_ordered(column) for column in columns]
        self.codes: NDArray[np.int64] = np.zeros((len(self.points), len(columns)), dtype=np.int64)
        for j, (column, values) in enumerate(zip(columns, ordered, strict=True)):
            rank = {_typed(value): code for code, value in enumerate(values)}
            self.codes[:, j] = [rank[_typed(value)] for value in column]
        self.num_values: list[int] = [len(values) for values in ordered]
        self.features: NDArray[np.float64] = self._make_features(columns, ordered)

    def __len__(self) -> int:
        return len(self.points)

    def find(self, point: Point) -> int | None:
        """Returns the index of a point, or None if it is not in the list."""
        return self._index.get(point_key(point))

    def _make_features(self, columns: Sequence[Sequence[Any]], ordered: Sequence[Sequence[Any]]) -> NDArray[np.float64]:
        features: list[NDArray[Any]] = []
        for column, codes, values in zip(columns, self.codes.T, ordered, strict=True):
            if len(values) == 2 or all(value is None or _is_number(value) for value in values):
                features.append(codes)
            else:
                features += [codes == code for code in range(len(values))]
            if all(value is None or isinstance(value, int) for value in values):
                twos = _powers_of_two(np.array([value or 0 for value in column], dtype=np.int64))
                features += [] if twos is None else [twos]
        if not features:
            return np.zeros((len(self.points), 1))
        stacked = np.stack(features, axis=1).astype(np.float64)
        return stacked / stacked.max(axis=0)


def point_key(point: Point) -> Hashable:
    """Returns a key that is the same for equal points, whatever the order of their parameters."""
    return tuple(sorted((name, *_typed(value)) for name, value in point.items()))


def _typed(value: Any) -> tuple[str, str]:
    """Returns a form of a value that can be compared with that of any other, and tells 1 from True."""
    return type(value).__name__, repr(value)


def _ordered(column: Sequence[Any]) -> list[Any]:
    """Returns the values that occur: a missing one, then numbers by size, then the rest by name."""
    values = list({_typed(value): value for value in column}.values())
    numbers = sorted(value for value in values if _is_number(value))
    rest = sorted((value for value in values if value is not None and not _is_number(value)), key=_typed)
    return [*(value for value in values if value is None), *numbers, *rest]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _powers_of_two(counts: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Returns how often each value can be halved; None where that is always the same or follows from the size."""
    if (counts < 0).any():
        return None
    positive = np.maximum(counts, 1)
    lowest_bit = positive & -positive
    if (lowest_bit == positive).all() or (lowest_bit == lowest_bit[0]).all():
        return None
    return np.log2(lowest_bit).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The points that a study has seen, as indices into the list, each once, in the order of the trials.

    Attributes:
        taken: the points that are finished, running or waiting; nobody else should try these.
        finished: the points with a time or a failure.
        times: the times of the finished points, NaN where a point failed.
    """

    taken: tuple[int, ...]
    finished: tuple[int, ...]
    times: tuple[float, ...]


class PointSampler(BaseSampler):
    """Chooses a point when a trial begins, keeps it in the trial, and answers each `suggest` from there.

    A relative sampler would have to name the distributions before the first `suggest`, where they are not known yet, so
    this works as Optuna's own `GridSampler` does. All that a choice depends on is in the storage: a search that was
    killed goes on as if it had not been, and several workers may share a study. A point is chosen again only when all
    were.

    Args:
        points: all points, each a mapping of parameter → value as `suggest` will ask for them; or their table.
        seed: equal seeds make equal choices from equal trials.
    """

    def __init__(self, points: Sequence[Point] | PointTable, *, seed: int) -> None:
        self.table = points if isinstance(points, PointTable) else PointTable(points)
        self.seed = seed
        self._finished: dict[tuple[int, int, datetime], _Seen] = {}  # finished trials do not change: read once

    @abstractmethod
    def choose(self, history: History, untaken: NDArray[np.bool_], rng: np.random.Generator) -> int:
        """Returns the index of the point to try next: one of the untaken, of which there is at least one."""

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Chooses a trial's point unless it has one, as an enqueued, retried or taken-over trial has."""
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
        """Returns no distributions: the class says why."""
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Returns no values: the class says why."""
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Returns one value of the trial's point.

        Raises:
            InvalidArgument: the trial was enqueued with some of its parameters only, or it asks for one that the point
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
        """Reads the points of all other trials; if a point has several, a time counts most, then a failure."""
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
        """Returns a trial's point, also before all its parameters are suggested, and its time."""
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
    """A sampler that chooses every point once, in an order that depends on the seed alone."""

    def choose(self, history: History, untaken: NDArray[np.bool_], rng: np.random.Generator) -> int:
        """Returns the first untaken point of the order."""
        order = np.random.default_rng(self.seed).permutation(len(self.table))
        return int(order[untaken[order]][0])


def _time_of(trial: FrozenTrial) -> float | None:
    """Returns a finished trial's time, NaN if it failed; None if it is not finished.

    A pruned trial counts with the time that it had then. Optuna retries one that failed because its process died, and
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


def parameters_of(schedule: Schedule) -> dict[str, Any]:
    """Returns a schedule's parameters: `dataflow`, and `DATAFLOW.KNOB` for each of its knobs."""
    return {"dataflow": schedule.dataflow, **{f"{schedule.dataflow}.{name}": value for name, value in schedule.knobs}}


def distributions_of(schedule: Schedule, space: SearchSpace) -> dict[str, BaseDistribution]:
    """Returns what each of a schedule's parameters may be."""
    dataflow = schedule.dataflow
    knobs = space.choices[dataflow]
    return {
        "dataflow": CategoricalDistribution(list(space.choices)),
        **{f"{dataflow}.{name}": CategoricalDistribution(knobs[name]) for name, _ in schedule.knobs},
    }


def schedule_of(parameters: Mapping[str, Any], space: SearchSpace) -> Schedule | None:
    """Returns the schedule that a trial's parameters stand for; None while some are not suggested yet."""
    dataflow = parameters.get("dataflow", "")
    if dataflow not in space.choices:
        return None
    names = {name: f"{dataflow}.{name}" for name in space.choices[dataflow]}
    if not parameters.keys() >= set(names.values()):
        return None
    return Schedule.of(dataflow, **{name: parameters[parameter] for name, parameter in names.items()})


def suggest(trial: optuna.Trial, space: SearchSpace) -> Schedule:
    """Asks a trial for the dataflow first, then for its knobs, and returns the schedule."""
    dataflow = trial.suggest_categorical("dataflow", list(space.choices))
    knobs: dict[str, Any] = {
        name: trial.suggest_categorical(f"{dataflow}.{name}", choices)
        for name, choices in space.choices[dataflow].items()
    }
    return Schedule.of(dataflow, **knobs)
