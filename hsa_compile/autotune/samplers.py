"""Optuna's samplers by name; `ours` is TPE for the time being."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna

SAMPLERS = ("ours", "tpe", "random", "grid", "gp", "cmaes")

_STARTUP_TRIALS = 8


def make_sampler(
    name: str,
    *,
    seed: int,
    space_points: Sequence[Mapping[str, Any]] | None = None,
    prior: Sequence[float] | None = None,
    cost: Callable[[Mapping[str, Any]], float] | None = None,
) -> optuna.samplers.BaseSampler:
    """A sampler over the points that are given; what it does not know of the rest is left aside."""
    del space_points, prior, cost
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=_STARTUP_TRIALS)
