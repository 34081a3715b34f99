import math

import pytest

from hsa_compile.autotune.cost.predict_schedule import prediction_correlation, spearman
from hsa_compile.autotune.cost.roofline import estimate
from hsa_compile.errors import InvalidArgument, InvalidTarget
from hsa_compile.problem import Problem
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.target import PRODUCTS, Target

PROBLEM = Problem(seq_len=16384, num_heads=32, num_kv_heads=2, head_dim=128, top_k=16, dtype="bfloat16")
H100 = PRODUCTS["h100"]


def test_the_correlation_is_of_ranks() -> None:
    assert spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)
    assert spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(0.9486832980505138)  # ties, as SciPy has it
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_times_that_the_model_gave_correlate_wholly() -> None:
    schedules = list(SearchSpace.of(PROBLEM, H100).schedules())[::40]
    times = {schedule: estimate(PROBLEM, schedule, H100) for schedule in schedules}
    assert prediction_correlation(PROBLEM, H100, times) == pytest.approx(1.0)
    backwards = {schedule: 1 / time for schedule, time in times.items()}
    assert prediction_correlation(PROBLEM, H100, backwards) == pytest.approx(-1.0)


def test_what_cannot_be_correlated_is_refused() -> None:
    with pytest.raises(InvalidTarget, match="no model of CPUs"):
        prediction_correlation(PROBLEM, Target.parse("cpu"), {})
    with pytest.raises(InvalidArgument, match="0 measured schedules are too few"):
        prediction_correlation(PROBLEM, H100, {})
