import random
from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from hsa_compile.autotune import search as search_module
from hsa_compile.autotune.candidate import Candidate
from hsa_compile.autotune.search import SearchResult, search
from hsa_compile.errors import CompileError, HSACompileError, OutOfResources, WrongResult
from hsa_compile.problem import Problem
from hsa_compile.schedules.default import default_schedule
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.target import Target

PROBLEM = Problem(seq_len=131072, num_heads=4, num_kv_heads=1, head_dim=64, top_k=8)
SMALL = Problem(seq_len=7, num_heads=1, num_kv_heads=1, head_dim=16, chunk_size=2, top_k=2)
FOREVER = float("inf")

Fake = Callable[[Schedule], Candidate]


class Bench:
    """A search with fake parts: what was prepared, in order, and times that depend on the schedule alone."""

    def __init__(self, target: Target, fake: Fake, problem: Problem = PROBLEM) -> None:
        self.problem, self.target, self.fake = problem, target, fake
        self.default = default_schedule(problem, target)
        self.valid = list(SearchSpace.of(problem, target).schedules(problem, target))
        self.prepared: list[Schedule] = []
        self.failing: dict[Schedule, HSACompileError] = {}

    def time(self, schedule: Schedule) -> float:
        if schedule == self.default:
            return 1.0
        return 0.5 + random.Random(str(schedule)).random()

    def prepare(self, schedule: Schedule) -> Candidate:
        self.prepared.append(schedule)
        if schedule in self.failing:
            raise self.failing[schedule]
        return self.fake(schedule)

    def time_pair(self, one: Candidate, other: Candidate) -> tuple[Sequence[float], Sequence[float]]:
        drift = [1.0, 1.5, 3.0]  # hits both alike
        return [d * self.time(one.schedule) for d in drift], [d * self.time(other.schedule) for d in drift]

    def run(self, **options: Any) -> SearchResult:
        settings: dict[str, Any] = {
            "first": [self.default],
            "prepare": self.prepare,
            "time_pair": self.time_pair,
            "max_trials": 20,
            "deadline": FOREVER,
            "seed": 0,
        }
        return search(self.problem, self.target, **{**settings, **options})


@pytest.fixture
def bench(cpu: Target, fake_candidate: Fake) -> Bench:
    return Bench(cpu, fake_candidate)


def test_the_default_is_the_first_trial_and_the_nearest_tuned_schedule_the_second(bench: Bench) -> None:
    nearest = next(schedule for schedule in reversed(bench.valid) if schedule != bench.default)
    result = bench.run(first=[bench.default, nearest])
    assert bench.prepared[:2] == [bench.default, nearest]
    assert [trial.candidate.schedule for trial in result.trials[:2]] == [bench.default, nearest]
    assert result.trials[0].ratio == 1.0


def test_a_nearest_schedule_that_is_the_default_is_not_tried_twice(bench: Bench) -> None:
    result = bench.run(first=[bench.default, bench.default], max_trials=3)
    assert result.num_tried == len(set(bench.prepared)) == 3


def test_only_valid_schedules_are_prepared_and_none_twice(bench: Bench) -> None:
    bench.run(max_trials=40)
    assert len(bench.prepared) == 40
    assert len(set(bench.prepared)) == 40
    assert set(bench.prepared) <= set(bench.valid)


@pytest.mark.parametrize("trials", [1, 2, 7])
def test_no_more_candidates_are_tried_than_allowed_the_default_included(bench: Bench, trials: int) -> None:
    result = bench.run(max_trials=trials)
    assert result.num_tried == len(bench.prepared) == trials


def test_the_search_ends_when_the_space_is_exhausted(cpu: Target, fake_candidate: Fake) -> None:
    bench = Bench(cpu, fake_candidate, SMALL)
    assert 2 <= len(bench.valid) <= 20
    result = bench.run(max_trials=1000)
    assert len(bench.prepared) == len(bench.valid)
    assert set(bench.prepared) == set(bench.valid)
    assert result.best.ratio == pytest.approx(min(bench.time(schedule) for schedule in bench.valid))


def test_a_large_space_is_exhausted_too(bench: Bench) -> None:
    bench.run(max_trials=1000)
    assert Counter(bench.prepared) == Counter(bench.valid)


def test_the_best_trial_has_the_least_ratio_to_the_default_whatever_the_drift(bench: Bench) -> None:
    result = bench.run(max_trials=30)
    assert result.best.ratio == pytest.approx(min(bench.time(schedule) for schedule in bench.prepared))
    for trial in result.trials:
        assert trial.ratio == pytest.approx(bench.time(trial.candidate.schedule))
        assert trial.median_ms == pytest.approx(1.5 * bench.time(trial.candidate.schedule))


def test_failing_candidates_are_counted_by_kind_and_skipped(bench: Bench) -> None:
    errors = [CompileError("no"), OutOfResources("no"), OutOfResources("no"), WrongResult("no")]
    others = [schedule for schedule in bench.valid if schedule != bench.default]
    bench.failing = dict(zip(others, errors, strict=False))
    result = bench.run(max_trials=1000)
    assert result.failures == {"CompileError": 1, "OutOfResources": 2, "WrongResult": 1}
    assert not {trial.candidate.schedule for trial in result.trials} & set(bench.failing)
    assert result.num_tried == len(bench.valid)
    assert Counter(bench.prepared) == Counter(bench.valid)


def test_failures_count_as_trials(bench: Bench) -> None:
    bench.failing = {schedule: WrongResult("no") for schedule in bench.valid if schedule != bench.default}
    result = bench.run(max_trials=9)
    assert result.num_tried == 9
    assert result.failures == {"WrongResult": 8}
    assert result.best.candidate.schedule == bench.default


@pytest.mark.parametrize("error", [CompileError, OutOfResources, WrongResult])
def test_a_failing_default_is_not_hidden(bench: Bench, error: type[HSACompileError]) -> None:
    bench.failing = {bench.default: error("the default is broken")}
    with pytest.raises(error, match="the default is broken"):
        bench.run()


def test_an_error_of_another_kind_is_not_hidden(bench: Bench) -> None:
    def prepare(schedule: Schedule) -> Candidate:
        if schedule != bench.default:
            raise KeyError("a bug")
        return bench.fake(schedule)

    with pytest.raises(KeyError, match="a bug"):
        bench.run(prepare=prepare)


def test_no_candidate_begins_after_the_deadline(bench: Bench, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "time", SimpleNamespace(monotonic=clock.monotonic))

    def prepare(schedule: Schedule) -> Candidate:
        clock.pass_(1.0)
        return bench.prepare(schedule)

    result = bench.run(prepare=prepare, max_trials=1000, deadline=clock.now + 4.5)
    assert result.num_tried == 5
    late = bench.run(prepare=prepare, max_trials=1000, deadline=clock.now - 1)
    assert [trial.candidate.schedule for trial in late.trials] == [bench.default]


def test_the_same_seed_makes_the_same_trials_and_another_seed_others(cpu: Target, fake_candidate: Fake) -> None:
    orders = []
    for seed in (3, 3, 4):
        bench = Bench(cpu, fake_candidate)
        bench.run(seed=seed, max_trials=25)
        orders.append(bench.prepared)
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_each_candidate_is_reported_once_failures_included(bench: Bench) -> None:
    bench.failing = {schedule: WrongResult("no") for schedule in bench.valid[::2] if schedule != bench.default}
    seen: list[int] = []
    bench.run(max_trials=12, on_trial=lambda result: seen.append(result.num_tried))
    assert seen == list(range(1, 13))


def test_fast_regions_are_asked_for_more_often_than_their_share(cpu: Target, fake_candidate: Fake) -> None:
    def is_fast(schedule: Schedule) -> bool:
        return schedule.get("tile_rows") == 1024

    fast, asked = 0, 0
    for seed in range(4):
        bench = Bench(cpu, fake_candidate)
        bench.time = lambda schedule: 0.2 if is_fast(schedule) else 1.0  # type: ignore[method-assign]
        bench.run(seed=seed, max_trials=len(bench.valid) // 2)
        fast += sum(map(is_fast, bench.prepared))
        asked += len(bench.prepared)
    share = sum(map(is_fast, bench.valid)) / len(bench.valid)
    assert fast / asked > 1.3 * share
