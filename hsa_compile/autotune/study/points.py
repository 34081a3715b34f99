"""Schedules as Optuna knows them: a categorical parameter for the dataflow, and one for each knob of each dataflow."""

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution

from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace


def parameters_of(schedule: Schedule) -> dict[str, Any]:
    """A schedule's parameters: `dataflow`, and `DATAFLOW.KNOB` for each of its knobs."""
    return {"dataflow": schedule.dataflow, **{f"{schedule.dataflow}.{name}": value for name, value in schedule.knobs}}


def distributions_of(schedule: Schedule, space: SearchSpace) -> dict[str, BaseDistribution]:
    """What each of a schedule's parameters may be."""
    dataflow = schedule.dataflow
    knobs = space.choices[dataflow]
    return {
        "dataflow": CategoricalDistribution(list(space.choices)),
        **{f"{dataflow}.{name}": CategoricalDistribution(knobs[name]) for name, _ in schedule.knobs},
    }


def schedule_of(parameters: Mapping[str, Any], space: SearchSpace) -> Schedule | None:
    """The schedule of a trial's parameters; None while some are not suggested yet."""
    dataflow = parameters.get("dataflow", "")
    if dataflow not in space.choices:
        return None
    names = {name: f"{dataflow}.{name}" for name in space.choices[dataflow]}
    if not parameters.keys() >= set(names.values()):
        return None
    return Schedule.of(dataflow, **{name: parameters[parameter] for name, parameter in names.items()})


def suggest(trial: optuna.Trial, space: SearchSpace) -> Schedule:
    """Asks for the dataflow first, then for its knobs."""
    dataflow = trial.suggest_categorical("dataflow", list(space.choices))
    knobs: dict[str, Any] = {
        name: trial.suggest_categorical(f"{dataflow}.{name}", choices)
        for name, choices in space.choices[dataflow].items()
    }
    return Schedule.of(dataflow, **knobs)
