import contextlib
import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from fake_benches import FakeBench, fake_time
from optuna.storages import InMemoryStorage

from hsa_compile.autotune import search as search_module
from hsa_compile.autotune.bench.isolation import CompilePool
from hsa_compile.autotune.evaluate import CLEARLY_SLOWER, FAR_SLOWER, QUICK_ROUNDS
from hsa_compile.autotune.samplers import make_sampler
from hsa_compile.autotune.samplers.point import parameters_of
from hsa_compile.autotune.search import MODEL_PATIENCE, PATIENCE, SearchResult, Trial, search
from hsa_compile.autotune.study.study import MakeSampler, TuningStudy
from hsa_compile.errors import CompileError, HSACompileError, OutOfResources, WrongResult
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace, default_schedule
from hsa_compile.target import Target

PROBLEM = Problem(seq_len=131072, num_heads=4, num_kv_heads=1, head_dim=64, top_k=8)
SMALL = Problem(seq_len=7, num_heads=1, num_kv_heads=1, head_dim=16, chunk_size=2, top_k=2)
FOREVER = float("inf")


class Bench(FakeBench):
    """A search with fake parts: what was prepared, in order, and times that depend on the schedule alone."""

    def __init__(self, target: Target, problem: Problem = PROBLEM) -> None:
        super().__init__(problem, target)
        self.problem, self.target = problem, target
        self.valid = list(SearchSpace.of(problem, target).schedules())
        self.timed: Counter[Schedule] = Counter()
        self.after_prepare: Callable[[], None] = lambda: None

    def prepare(self, schedule: Schedule) -> str:
        fingerprint = super().prepare(schedule)
        self.after_prepare()
        return fingerprint

    def time(self, schedules: Sequence[Schedule], rounds: int) -> list[list[float]]:
        self.timed[schedules[0]] += rounds
        return super().time(schedules, rounds)

    def study(
        self,
        seed: int = 0,
        max_trials: int = 20,
        first: Sequence[Schedule] | None = None,
        make_sampler: MakeSampler | None = None,
    ) -> TuningStudy:
        storage = InMemoryStorage()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return TuningStudy(
            optuna.create_study(storage=storage),
            storage,
            self.problem,
            self.target,
            first=first or [self.default],
            max_trials=max_trials,
            make_sampler=make_sampler
            or (lambda number: optuna.samplers.TPESampler(seed=1000 * seed + number, n_startup_trials=8)),
            seed=seed,
        )

    def run(self, deadline: float = FOREVER, on_trial: Any = lambda result: None, **options: Any) -> SearchResult:
        return search(self.study(**options), self, deadline=deadline, on_trial=on_trial)


@pytest.fixture
def bench(cpu: Target) -> Bench:
    return Bench(cpu)


def test_the_default_is_the_first_trial_and_the_nearest_tuned_schedule_the_second(bench: Bench) -> None:
    nearest = next(schedule for schedule in reversed(bench.valid) if schedule != bench.default)
    result = bench.run(first=[bench.default, nearest])
    assert bench.prepared[:2] == [bench.default, nearest]
    assert [trial.schedule for trial in result.trials[:2]] == [bench.default, nearest]
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


def test_the_search_ends_when_the_space_is_exhausted(cpu: Target) -> None:
    bench = Bench(cpu, SMALL)
    assert 2 <= len(bench.valid) <= 20
    result = bench.run(max_trials=1000)
    assert len(bench.prepared) == len(bench.valid)
    assert set(bench.prepared) == set(bench.valid)
    assert result.best.ratio == pytest.approx(min(bench.time_of(schedule) for schedule in bench.valid))


@pytest.mark.exhaustive
def test_a_large_space_is_exhausted_too(bench: Bench) -> None:
    bench.run(max_trials=1000)
    assert Counter(bench.prepared) == Counter(bench.valid)


def test_the_best_trial_has_the_least_ratio_to_the_default_whatever_the_drift(bench: Bench) -> None:
    result = bench.run(max_trials=30)
    assert result.best.ratio == pytest.approx(min(bench.time_of(schedule) for schedule in bench.prepared))
    for trial in result.trials:
        assert trial.ratio == pytest.approx(bench.time_of(trial.schedule))
        assert trial.median_ms == pytest.approx(1.5 * bench.time_of(trial.schedule))


def test_failing_candidates_are_counted_by_kind_and_skipped(bench: Bench) -> None:
    errors = [CompileError("no"), OutOfResources("no"), OutOfResources("no"), WrongResult("no")]
    others = [schedule for schedule in bench.valid if schedule != bench.default]
    bench.failing = dict(zip(others, errors, strict=False))
    result = bench.run(max_trials=9, first=[bench.default, *bench.failing])
    assert result.failures == {"CompileError": 1, "OutOfResources": 2, "WrongResult": 1}
    assert not {trial.schedule for trial in result.trials} & set(bench.failing)
    assert result.num_tried == len(set(bench.prepared)) == len(bench.prepared) == 9


def test_failures_count_as_trials(bench: Bench) -> None:
    bench.failing = {schedule: WrongResult("no") for schedule in bench.valid if schedule != bench.default}
    result = bench.run(max_trials=9)
    assert result.num_tried == 9
    assert result.failures == {"WrongResult": 8}
    assert result.best.schedule == bench.default


@pytest.mark.parametrize("error", [CompileError, OutOfResources, WrongResult])
def test_a_failing_default_is_not_hidden(bench: Bench, error: type[HSACompileError]) -> None:
    bench.failing = {bench.default: error("the default is broken")}
    with pytest.raises(error, match="the default is broken"):
        bench.run()


def test_an_error_of_another_kind_is_not_hidden(bench: Bench) -> None:
    bench.failing = {schedule: KeyError("a bug") for schedule in bench.valid if schedule != bench.default}
    with pytest.raises(KeyError, match="a bug"):
        bench.run()


def test_no_candidate_begins_after_the_deadline(bench: Bench, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "time", SimpleNamespace(monotonic=clock.monotonic))

    bench.after_prepare = lambda: clock.pass_(1.0)
    result = bench.run(max_trials=1000, deadline=clock.now + 4.5)
    assert result.num_tried == 5
    late = bench.run(max_trials=1000, deadline=clock.now - 1)
    assert [trial.schedule for trial in late.trials] == [bench.default]


class Compilers:
    """Two compilers in threads, one schedule for which they wait until `enough` is set."""

    def __init__(self, slow: Schedule) -> None:
        self.slow, self.enough = slow, threading.Event()

    def compile(self, schedule: Schedule) -> None:
        if schedule == self.slow:
            assert self.enough.wait(60), "the device waits for a slow compilation"

    def close(self) -> None: ...


@pytest.mark.parametrize("pause_to_time", [False, True])
def test_a_device_with_cores_of_its_own_gets_what_is_compiled_first(bench: Bench, pause_to_time: bool) -> None:
    first = [bench.default, *(schedule for schedule in bench.valid if schedule != bench.default)][:8]
    compilers = Compilers(first[1])

    def after_prepare() -> None:
        if len(bench.prepared) == (1 if pause_to_time else 5):
            compilers.enough.set()

    bench.after_prepare = after_prepare
    with CompilePool([compilers, compilers]) as pool:
        study = bench.study(first=first, max_trials=8)
        result = search(study, bench, deadline=FOREVER, pool=pool, pause_to_time=pause_to_time)
    assert {trial.schedule for trial in result.trials} == set(first)
    assert set(bench.prepared) == set(first)
    if pause_to_time:
        assert bench.prepared == first  # in their order, which a search that was killed repeats
    else:
        assert bench.prepared.index(first[1]) >= 5


def test_the_same_seed_makes_the_same_trials_and_another_seed_others(cpu: Target) -> None:
    orders = []
    for seed in (3, 3, 4):
        bench = Bench(cpu)
        bench.run(seed=seed, max_trials=25)
        orders.append(bench.prepared)
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_each_candidate_is_reported_once_failures_included(bench: Bench) -> None:
    bench.failing = {schedule: WrongResult("no") for schedule in bench.valid[::2] if schedule != bench.default}
    seen: list[int] = []
    bench.run(max_trials=12, on_trial=lambda result: seen.append(result.num_tried))
    assert seen == list(range(1, 13))


@pytest.mark.exhaustive
def test_fast_regions_are_asked_for_more_often_than_their_share(cpu: Target) -> None:
    def is_fast(schedule: Schedule) -> bool:
        return schedule.get("tile_rows") == 1024

    fast, asked = 0, 0
    for seed in range(4):
        bench = Bench(cpu)
        bench.time_of = lambda schedule: 0.2 if is_fast(schedule) else 1.0  # type: ignore[method-assign]
        bench.run(seed=seed, max_trials=len(bench.valid) // 2)
        fast += sum(map(is_fast, bench.prepared))
        asked += len(bench.prepared)
    share = sum(map(is_fast, bench.valid)) / len(bench.valid)
    assert fast / asked > 1.3 * share


def test_a_candidate_that_is_clearly_slower_gets_the_quick_timings_only(bench: Bench) -> None:
    slow, good, *_ = (schedule for schedule in bench.valid if schedule != bench.default)
    bench.time_of = lambda schedule: {slow: 2 * CLEARLY_SLOWER}.get(schedule, 1.0)  # type: ignore[method-assign]
    bench.run(first=[bench.default, slow, good], max_trials=3)
    assert bench.timed[slow] == QUICK_ROUNDS
    assert bench.timed[good] > QUICK_ROUNDS


def test_a_candidate_that_is_far_slower_than_a_long_kernel_is_timed_once(bench: Bench) -> None:
    slow, good, *_ = (schedule for schedule in bench.valid if schedule != bench.default)
    bench.time_of = lambda schedule: {slow: 200 * FAR_SLOWER}.get(schedule, 100.0)  # type: ignore[method-assign]
    result = bench.run(first=[bench.default, slow, good], max_trials=3)
    assert bench.timed[slow] == 1
    assert bench.timed[good] > 1
    assert [trial.ratio for trial in result.trials] == [1, 2 * FAR_SLOWER, 1]


def test_a_search_that_is_asked_to_stop_does_and_gives_back_what_it_began(bench: Bench) -> None:
    study = bench.study(max_trials=1000)
    result = search(study, bench, deadline=FOREVER, should_stop=lambda: len(bench.prepared) >= 4)
    assert result.num_tried == 4
    assert not [trial for trial in study.study.trials if trial.state == optuna.trial.TrialState.RUNNING]


def test_what_an_error_or_ctrl_c_leaves_running_is_taken_over_and_nothing_is_repeated(bench: Bench) -> None:
    study = bench.study(max_trials=6)

    def interrupt() -> None:
        if len(bench.prepared) == 3:
            raise KeyboardInterrupt

    bench.after_prepare = interrupt
    with contextlib.suppress(KeyboardInterrupt):
        search(study, bench, deadline=FOREVER)
    half = bench.prepared[-1]
    bench.after_prepare = lambda: None
    result = search(study, bench, deadline=FOREVER)
    assert result.num_tried == 6
    assert Counter(bench.prepared) == {**Counter(set(bench.prepared)), bench.default: 2, half: 2}
    whole = Bench(bench.target)
    whole.run(max_trials=6)
    assert list(dict.fromkeys(bench.prepared)) == whole.prepared


def test_a_search_has_settled_when_nothing_much_better_came_up_for_long() -> None:
    def result(ratios: Sequence[float]) -> SearchResult:
        schedule = Schedule.of("token", block_tokens=1)
        return SearchResult(trials=[Trial(schedule=schedule, ratio=ratio, median_ms=ratio) for ratio in ratios])

    assert not result([1.0] * PATIENCE).has_settled(0.02)
    assert result([1.0] * (PATIENCE + 1)).has_settled(0.02)
    assert result([1.0] * PATIENCE + [0.985]).has_settled(0.02)
    assert not result([1.0] * PATIENCE + [0.975]).has_settled(0.02)


@pytest.mark.parametrize("sampler", ["ours", "random"])
def test_a_search_ends_when_the_gain_that_is_left_is_small(bench: Bench, sampler: str) -> None:
    def smooth(schedule: Schedule) -> float:
        return 1.0 + sum(0.1 * abs(math.log2(schedule.get(name) or 1) - 10) for name in ("super_tile", "tile_rows"))

    bench.time_of = smooth  # type: ignore[method-assign]
    points = [parameters_of(schedule) for schedule in bench.valid]
    study = bench.study(
        max_trials=1000, make_sampler=lambda number: make_sampler(sampler, seed=number, space_points=points)
    )
    result = search(study, bench, deadline=FOREVER, until_within=0.02)
    assert result.num_tried < len(bench.valid)
    if sampler == "random":
        assert study.expected_gain() is None
        assert result.has_settled(0.02)
    else:
        gain = study.expected_gain()
        assert gain is not None
        assert gain <= 0.02
        assert result.has_settled(0.02, MODEL_PATIENCE)
        assert result.best.ratio <= 1.02 * min(map(bench.time_of, bench.valid))


def test_a_model_that_expects_more_keeps_the_search_going_however_long_nothing_came_up(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.time_of = lambda schedule: 1.0  # type: ignore[method-assign]
    monkeypatch.setattr(TuningStudy, "expected_gain", lambda study: 0.5)
    result = search(bench.study(max_trials=2 * PATIENCE), bench, deadline=FOREVER, until_within=0.02)
    assert result.has_settled(0.02)
    assert result.num_tried == min(2 * PATIENCE, len(bench.valid))


def test_fake_times_are_what_the_tests_above_take_them_for(bench: Bench) -> None:
    assert fake_time(bench.default, bench.default) == 1.0 == default_time(bench)
    assert len({bench.time_of(schedule) for schedule in bench.valid}) > len(bench.valid) // 2


def default_time(bench: Bench) -> float:
    return bench.time_of(default_schedule(bench.problem, bench.target))


def test_on_several_distributions_the_geometric_mean_decides(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = ("random", "trained")

    def time(self: Bench, schedules: Sequence[Schedule], rounds: int, name: str) -> list[list[float]]:
        factor = {"random": 4.0, "trained": 1.0}[name]
        return [[factor if schedule == self.default else self.time_of(schedule)] * rounds for schedule in schedules]

    monkeypatch.setattr(Bench, "time", time)
    result = search(bench.study(max_trials=6), bench, deadline=FOREVER, inputs=inputs)
    assert result.trials[0].ratios == {"random": 1.0, "trained": 1.0}
    for trial in result.trials[1:]:
        own = bench.time_of(trial.schedule)
        assert trial.ratios == {"random": pytest.approx(own / 4), "trained": pytest.approx(own)}
        assert trial.ratio == pytest.approx(own / 2)
        assert trial.median_ms == pytest.approx(own)
