"""How well the model orders schedules: its ranks against those of measured times."""

import math
from collections.abc import Mapping, Sequence

from hsa_compile.autotune.kernel_model import estimate
from hsa_compile.autotune.predicted import check_predictable
from hsa_compile.errors import InvalidArgument
from hsa_compile.kernels.ahead_of_time import KernelResources
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import Target

MIN_SCHEDULES = 3


def prediction_correlation(
    problem: Problem,
    target: Target,
    times: Mapping[Schedule, float],
    kernels: Mapping[Schedule, Sequence[KernelResources]] | None = None,
) -> float:
    """Spearman's rank correlation of predicted with measured times, −1 … 1; NaN where all are equal.

    Args:
        times: measured, of each schedule.
        kernels: what their kernels use, where that is known.

    Raises:
        InvalidTarget: there is no model for the target; there is none for CPUs.
        InvalidArgument: there are too few schedules.
    """
    check_predictable(target)
    if len(times) < MIN_SCHEDULES:
        raise InvalidArgument(f"{len(times)} measured schedules are too few to correlate; {MIN_SCHEDULES} are needed")
    known = kernels or {}
    predicted = [estimate(problem, schedule, target, known.get(schedule, ())) for schedule in times]
    return spearman(predicted, list(times.values()))


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Correlation of the ranks of two lists of equal length; equal values share their mean rank."""
    left, right = _ranks(one), _ranks(other)
    mean = (len(left) - 1) / 2
    covariance = sum((a - mean) * (b - mean) for a, b in zip(left, right, strict=True))
    spread = math.sqrt(sum((a - mean) ** 2 for a in left) * sum((b - mean) ** 2 for b in right))
    return covariance / spread if spread else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    """Of each value: how many are less, and half of the others that are equal."""
    return [sum(v < value for v in values) + (sum(v == value for v in values) - 1) / 2 for value in values]
