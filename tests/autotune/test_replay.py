"""Searches replayed on sweeps: what costs an evaluation, and what the samplers reach."""

import itertools
import math
from pathlib import Path

import pytest

from hsa_compile.autotune.bench.bench import quantile
from hsa_compile.autotune.samplers.point import parameters_of
from hsa_compile.autotune.sweeps import RecordedSweep, Replay, first_points, replay
from hsa_compile.errors import InvalidArgument
from hsa_compile.problem import Problem
from hsa_compile.schedules.space import SearchSpace, default_schedule
from hsa_compile.target import Target

SHARED = Path(__file__).resolve().parents[3] / "shared" / "sweeps"
OWN = Path(__file__).resolve().parents[2] / "benchmarks" / "sweeps"


@pytest.fixture
def sweep() -> RecordedSweep:
    """Of 6 × 6 points those below the diagonal are not in the space, and the corner fails."""
    points = [{"a": a, "b": b} for a, b in itertools.product(range(6), range(6)) if a <= b]
    times = [None if point == {"a": 0, "b": 0} else 1.0 + abs(point["a"] - 2) + abs(point["b"] - 4) for point in points]
    return RecordedSweep(points=points, times=times, reasons=["failed" if time is None else "" for time in times])


@pytest.mark.parametrize("sampler", ["ours", "tpe", "random", "grid"])
def test_every_sampler_comes_to_the_optimum_of_the_whole_space(sweep: RecordedSweep, sampler: str) -> None:
    best = replay(sweep, sampler, seed=1, evaluations=len(sweep.points))
    assert len(best) == len(sweep.points)
    assert best[-1] == sweep.optimum == 1.0
    assert best == sorted(best, reverse=True)


def test_equal_seeds_replay_alike(sweep: RecordedSweep) -> None:
    assert [replay(sweep, "ours", 2, 15)] * 2 == [replay(sweep, "ours", 2, 15) for _ in range(2)]
    assert len({tuple(replay(sweep, "random", seed, 5)) for seed in range(6)}) > 1


def test_a_point_that_fails_costs_an_evaluation() -> None:
    sweep = RecordedSweep(points=[{"a": a} for a in range(9)], times=[*[None] * 8, 1.0], reasons=[*["failed"] * 8, ""])
    curves = [replay(sweep, "random", seed, 9) for seed in range(5)]
    assert any(curve[0] == math.inf for curve in curves)
    assert all(curve[-1] == 1.0 for curve in curves)


def test_conditional_parameters_are_asked_for_where_they_exist() -> None:
    points = [{"flow": "x", "x.n": n} for n in (1, 2, 3)] + [{"flow": "y", "y.m": m} for m in (4, 5)]
    sweep = RecordedSweep(points=points, times=[3.0, 4.0, 5.0, 2.0, 1.0], reasons=[""] * 5)
    for sampler in ("ours", "random"):
        assert replay(sweep, sampler, seed=0, evaluations=10)[-1] == 1.0
        assert len(replay(sweep, sampler, seed=0, evaluations=10)) == 5


def test_a_search_begins_with_the_points_that_it_is_given(sweep: RecordedSweep) -> None:
    times = dict(zip(map(str, sweep.points), sweep.times, strict=True))
    slow, good = {"a": 5, "b": 5}, {"a": 2, "b": 5}
    for sampler in ("ours", "tpe"):
        best = Replay(sweep, first=[slow, good]).run(sampler, seed=0, evaluations=10)
        assert best[:2] == [times[str(slow)], times[str(good)]]
    not_in_the_sweep = {"a": 5, "b": 0}
    assert len(Replay(sweep, first=[not_in_the_sweep]).run("random", seed=0, evaluations=10)) == 10


def test_only_a_sweep_of_our_own_has_a_default_to_begin_with(sweep: RecordedSweep, cpu: Target) -> None:
    assert first_points(sweep) == []
    problem = Problem(seq_len=4096, num_heads=16, num_kv_heads=1, head_dim=64, top_k=8)
    schedules = list(SearchSpace.of(problem, cpu).schedules())
    own = RecordedSweep.of_schedules(dict.fromkeys(schedules, 1.0), problem=problem, target=cpu)
    assert first_points(own) == [parameters_of(default_schedule(problem, cpu))]


def test_no_evaluation_is_refused(sweep: RecordedSweep) -> None:
    with pytest.raises(InvalidArgument, match="evaluations = 0 must be at least 1"):
        replay(sweep, "ours", seed=0, evaluations=0)


# What our own spaces must come to in a share of their points, begun as `tune` does: the highest median of time over the
# optimum.
OWN_GOALS = [("cpu_forward", 0.10, 1.02), ("cpu_backward", 0.10, 1.02)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "share", "goal"), OWN_GOALS)
def test_our_sampler_gets_far_in_a_few_points_of_our_own_spaces(name: str, share: float, goal: float) -> None:
    sweep = RecordedSweep.load(OWN / f"{name}.json.gz")
    evaluations = int(share * len(sweep.points))
    ready = Replay(sweep, first_points(sweep))
    ends = [ready.run("ours", seed, evaluations)[-1] / sweep.optimum for seed in range(20)]
    assert quantile(ends, 0.5) <= goal


# What each public sweep must come to: evaluations, then the highest median and p90 of time over the optimum.
GOALS = [
    ("gemm_rtx3090", 100, 1.000, 1.05),
    ("gemm_rtx3090", 200, 1.000, 1.000),
    ("convolution_a100", 100, 1.075, 1.560),
    ("convolution_a100", 200, 1.000, 1.10),
    ("pnpoly_rtx3090", 100, 1.000, 1.015),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemm_rtx3090", "convolution_a100", "pnpoly_rtx3090"])
def test_our_sampler_earns_its_place(name: str) -> None:
    path = SHARED / f"{name}.json.gz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    ready = Replay(RecordedSweep.load(path))
    curves = [ready.run("ours", seed, 200) for seed in range(20)]
    for evaluations, median, p90 in [goal[1:] for goal in GOALS if goal[0] == name]:
        ends = sorted(curve[evaluations - 1] / ready.sweep.optimum for curve in curves)
        assert quantile(ends, 0.5) <= median + 1e-9, evaluations
        assert quantile(ends, 0.9) <= p90 + 1e-9, evaluations
