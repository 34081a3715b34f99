import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hsa_compile
from hsa_compile.autotune.bench import bench as bench_module
from hsa_compile.autotune.bench.bench import Candidate, prepare
from hsa_compile.autotune.options import MAX_SEED
from hsa_compile.autotune.search import Trial
from hsa_compile.autotune.session import first_schedules, with_rows_kept
from hsa_compile.autotune.tune import Progress, conflict, tune
from hsa_compile.errors import (
    CompilerCrashed,
    HSACompileError,
    InvalidArgument,
    InvalidTarget,
    OutOfMemory,
    TimedOut,
    WrongResult,
)
from hsa_compile.problem import OPS, Problem
from hsa_compile.schedules.cache import default_cache
from hsa_compile.schedules.ops import backend_for
from hsa_compile.schedules.record import TuningRecord
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace, default_schedule
from hsa_compile.target import NAMED_TARGETS, Target

PROBLEM = Problem(seq_len=131, num_heads=4, num_kv_heads=1, head_dim=16, chunk_size=16, top_k=2)
QUICK: dict[str, Any] = {"device": "cpu", "trials": 3, "timeout": 600.0, "isolate": False}


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Schedule]:
    """Schedules in the order in which the search prepared them."""
    order: list[Schedule] = []

    def spy(problem: Problem, schedule: Schedule, *rest: Any) -> Candidate:
        order.append(schedule)
        return prepare(problem, schedule, *rest)

    monkeypatch.setattr(bench_module, "prepare", spy)
    return order


@pytest.mark.parametrize("op", OPS)
def test_a_tiny_problem_is_tuned_from_end_to_end(op: str) -> None:
    problem = PROBLEM.with_op(op)
    seen: list[Progress] = []
    record = tune(
        problem, trials=4, timeout=600.0, device="cpu", isolate=False, distribution="local", on_progress=seen.append
    )
    target = Target.parse("cpu")
    assert (record.problem, record.target, record.inputs) == (problem, target, "local")
    assert SearchSpace.of(problem, target).is_valid(record.schedule)
    assert record.measurement.median_ms > 0
    assert record.default_measurement.median_ms > 0
    assert 1 <= record.trials <= 4
    assert not record.failures
    assert record.versions["torch"] == torch.__version__.split("+")[0] or record.versions["torch"] == torch.__version__
    assert record.date.endswith("+00:00")
    assert [progress.tried for progress in seen] == list(range(1, record.trials + 1))
    assert all(progress.best_ms > 0 and progress.elapsed_s >= 0 for progress in seen)
    kernel = hsa_compile.emit(problem, record.schedule, target)
    assert kernel.fingerprint == record.fingerprint


def test_a_search_for_two_distributions_keeps_the_times_on_each() -> None:
    record = tune(PROBLEM, **QUICK, distribution="random and trained")
    assert record.inputs == "random and trained"
    assert list(record.by_inputs) == ["random", "trained"]
    for own, default in record.by_inputs.values():
        assert own.repeats == default.repeats == record.measurement.repeats
    least, most = sorted(own.median_ms for own, _ in record.by_inputs.values())
    assert 0.5 * least < record.measurement.median_ms < 2 * most
    assert TuningRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_a_search_says_so_if_no_schedule_is_near_the_best_on_both() -> None:
    schedules = [Schedule.of("chunk", number=number) for number in range(3)]

    def trials(*ratios: tuple[float, float]) -> list[Trial]:
        return [
            Trial(schedule=schedule, ratio=1.0, median_ms=1.0, ratios={"random": one, "trained": other})
            for schedule, (one, other) in zip(schedules, ratios, strict=False)
        ]

    apart = conflict(trials((1.0, 1.0), (0.8, 1.2), (1.3, 0.7)), schedules[0])
    assert apart == (
        "; none is within 10% of the best on all of random, trained: "
        "chunk number=1 takes 0.80 times its time on random, chunk number=2 takes 0.70 times its time on trained"
    )
    assert conflict(trials((1.0, 1.0), (0.92, 1.2), (1.3, 0.93)), schedules[0]) == ""
    assert conflict([Trial(schedule=schedules[0], ratio=1.0, median_ms=1.0)], schedules[0]) == ""


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("op", [OPS[0], pytest.param(OPS[1], marks=pytest.mark.exhaustive)])
def test_a_tiny_problem_is_tuned_in_cpp_where_there_is_a_compiler(op: str) -> None:
    problem = PROBLEM.with_op(op)
    record = tune(problem, trials=2, timeout=600.0, device="cpu", isolate=False)
    assert record.target.has_compiler
    assert backend_for(problem, record.target) == "cpp"
    assert (record.trials, record.failures) == (2, {})
    default_cache().put(record)
    found = default_cache().lookup(problem, Target.parse("cpu"))
    assert found is not None
    assert found.schedule == record.schedule


def test_tuning_stores_nothing_and_what_is_stored_is_what_runs(tmp_path: Any) -> None:
    record = tune(PROBLEM, **QUICK)
    assert not list(default_cache().entries())
    assert not (tmp_path / "cache" / "schedules").exists()
    default_cache().put(record)
    assert hsa_compile.resolve(PROBLEM, record.target).source.schedule == record.schedule


def test_the_default_is_tried_first_and_the_nearest_tuned_schedule_second(prepared: list[Schedule]) -> None:
    longer = replace(PROBLEM, seq_len=1000, kv_len=1000)
    target = Target.parse("cpu")
    default = default_schedule(PROBLEM, target)
    nearest = next(schedule for schedule in SearchSpace.of(PROBLEM, target).schedules() if schedule != default)
    record = tune(longer, trials=1, timeout=600.0, device="cpu", isolate=False)
    default_cache().put(replace(record, schedule=nearest))
    prepared.clear()
    tune(PROBLEM, trials=2, timeout=600.0, device="cpu", isolate=False)
    assert prepared == [default, nearest]


@pytest.mark.parametrize(
    ("knobs", "group", "new_group", "expected"),
    [
        ({"dataflow": "union", "block_tokens": 2}, 16, 4, {"block_tokens": 8}),
        ({"dataflow": "union", "block_tokens": 8}, 4, 16, {"block_tokens": 2}),
        ({"dataflow": "union", "block_tokens": 8}, 8, 8, {}),
        ({"dataflow": "union", "block_tokens": 16}, 32, 1, {"block_tokens": 32}),  # as many as there may be
        ({"dataflow": "union", "block_tokens": 8}, 12, 4, {"block_tokens": 32}),  # 24 tokens would have as many rows
        ({"dataflow": "chunk", "block_entries": 4, "segment": 128}, 16, 4, {"block_entries": 16}),
        ({"dataflow": "fused", "segment": 16, "super_tile": 512}, 16, 4, {"segment": 64, "super_tile": 2048}),
        ({"dataflow": "token", "num_warps": 4}, 16, 4, {}),
    ],
    ids=str,
)
def test_a_schedule_of_another_group_keeps_the_rows_of_its_tiles(
    knobs: dict[str, Any], group: int, new_group: int, expected: dict[str, int]
) -> None:
    problem = replace(PROBLEM, num_heads=new_group)
    kept = with_rows_kept(Schedule.from_dict(knobs), group, new_group, SearchSpace.of(problem, NAMED_TARGETS["sm_90"]))
    assert dict(kept) == {**knobs, **expected}


def test_a_search_begins_with_the_winner_of_another_group_with_its_rows_kept() -> None:
    target = NAMED_TARGETS["sm_90"]
    problem = Problem(seq_len=4096, num_heads=16, num_kv_heads=1, head_dim=64, top_k=8, dtype="bfloat16")
    winner = Schedule.of("union", block_tokens=1, num_warps=4, num_stages=2)
    kept = Schedule.from_dict({**winner, "block_tokens": 4})
    smaller = replace(problem, num_kv_heads=4)
    assert SearchSpace.of(problem, target).is_valid(winner)
    assert SearchSpace.of(smaller, target).is_valid(kept)
    record = tune(PROBLEM, **{**QUICK, "trials": 1})
    default_cache().put(replace(record, problem=problem, target=target, schedule=winner))
    assert first_schedules(smaller, target)[:2] == [default_schedule(smaller, target), kept]
    assert first_schedules(replace(problem, seq_len=8192), target)[1] == winner


def test_a_neighbour_whose_schedule_is_none_any_more_is_passed_over() -> None:
    problem = Problem(op="select_chunks", seq_len=1024, num_heads=1, num_kv_heads=1, head_dim=64, top_k=8)
    target = NAMED_TARGETS["sm_90"]
    record = tune(PROBLEM, **{**QUICK, "trials": 1})
    useless = Schedule.of("stream", block_tokens=0, block_n=64)
    default_cache().put(replace(record, problem=replace(problem, seq_len=2048), target=target, schedule=useless))
    assert first_schedules(problem, target)[0] == default_schedule(problem, target)


def fails(monkeypatch: pytest.MonkeyPatch, kind: type[HSACompileError], count: int) -> None:
    """Has the first candidates but the default fail; the others take as long as the default."""
    valid = list(SearchSpace.of(PROBLEM, Target.parse("cpu")).schedules())
    default = default_schedule(PROBLEM, Target.parse("cpu"))
    failing = [schedule for schedule in valid if schedule != default][:count]

    def time_or_fail(problem: Problem, schedule: Schedule, *rest: Any) -> Candidate:
        if schedule in failing:
            raise kind("killed")
        return Candidate(schedule=schedule, fingerprint="0123456789abcdef", call=lambda: None)

    monkeypatch.setattr(bench_module, "prepare", time_or_fail)
    monkeypatch.setattr(bench_module, "measure", lambda calls, device, rounds: [[1.0] * rounds for _ in calls])


@pytest.mark.parametrize("kind", [TimedOut, CompilerCrashed, OutOfMemory, WrongResult])
def test_a_search_that_failed_mostly_for_reasons_that_may_pass_is_not_whole_and_the_next_tries_again(
    kind: type[HSACompileError], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    count = sum(1 for _ in SearchSpace.of(PROBLEM, Target.parse("cpu")).schedules())
    options = {"device": "cpu", "trials": count, "timeout": 600.0, "isolate": False, "sampler": "random",
               "storage": str(tmp_path / "study.journal"), "ledger": tmp_path / "ledger.jsonl"}  # fmt: skip
    passes = kind is not WrongResult
    fails(monkeypatch, kind, count - 4)
    first = tune(PROBLEM, **options)
    assert (first.trials, first.timed) == (count, 4)
    assert (first.complete, first.tried_all) == (not passes, not passes)
    assert (first.shortfall is None) == (not passes)
    fails(monkeypatch, kind, 0)
    again = tune(PROBLEM, **options)
    assert again.timed == (count if passes else 4)


def test_a_verdict_of_any_length_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hsa_compile.autotune.tune.conflict", lambda trials, winner: "\n" + "x" * 3000)
    record = tune(PROBLEM, **QUICK)
    assert TuningRecord.from_dict(record.to_dict()).verdict.endswith("xxx…")


def test_a_search_in_this_process_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[str] = []

    class Lock:
        def __enter__(self) -> None:
            held.append("held")

        def __exit__(self, *_: object) -> None:
            held.pop()

    def checked(work: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            assert held
            return work(*arguments, **options)

        return call

    monkeypatch.setattr("hsa_compile.autotune.session.device_lock", lambda device: Lock())
    monkeypatch.setattr(bench_module, "prepare", checked(prepare))
    monkeypatch.setattr(bench_module, "measure", checked(bench_module.measure))
    assert tune(PROBLEM, **QUICK).trials == 3
    assert not held


def test_one_trial_is_the_default_alone(prepared: list[Schedule]) -> None:
    record = tune(PROBLEM, **{**QUICK, "trials": 1})
    assert prepared == [record.schedule] == [default_schedule(PROBLEM, Target.parse("cpu"))]
    assert record.measurement == record.default_measurement
    assert record.speedup == 1.0


@pytest.mark.parametrize("sampler", ["ours", "random"])
def test_the_same_seed_tries_the_same_schedules(
    sampler: str, prepared: list[Schedule], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_module, "measure", lambda calls, device, rounds: [[1.0] * rounds for _ in calls])
    orders = []
    for seed in (7, 7, 8):
        prepared.clear()
        tune(PROBLEM, **{**QUICK, "trials": 5, "timeout": 60.0, "seed": seed, "sampler": sampler})
        orders.append(list(prepared))
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_a_candidate_that_is_wrong_is_counted_and_never_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    default = default_schedule(PROBLEM, Target.parse("cpu"))

    def wrong_but_default(problem: Problem, schedule: Schedule, *rest: Any) -> Candidate:
        if schedule != default:
            raise WrongResult("o is off")
        return prepare(problem, schedule, *rest)

    monkeypatch.setattr(bench_module, "prepare", wrong_but_default)
    record = tune(PROBLEM, **QUICK)
    assert record.schedule == default
    assert record.failures == {"WrongResult": 2}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"trials": 0}, "trials = 0 must be at least 1"),
        ({"timeout": 0}, "timeout = 0 must be more than 0"),
        ({"timeout": float("nan")}, "timeout = nan must be more than 0"),
        ({"timeout": float("inf")}, "timeout = inf must be more than 0 seconds and finite"),
        ({"seed": -1}, "seed = -1 must be in 0"),
        ({"seed": MAX_SEED + 1}, f"seed = {MAX_SEED + 1} must be in 0 … {MAX_SEED}"),
        ({"distribution": "odd"}, "distribution = 'odd' is not one of random, local, hot"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused_with_its_value(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        tune(PROBLEM, **{**QUICK, **options})


def test_the_largest_seed_works() -> None:
    assert tune(PROBLEM, **{**QUICK, "seed": MAX_SEED}).trials == 3


@pytest.mark.parametrize("device", ["sm_90", "banana", "cpu:x", "cuda:01", "cuda:99999999999999999999"])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(InvalidTarget, match=f"'{device}' is not known; allowed are cpu, cuda"):
        tune(PROBLEM, **{**QUICK, "device": device})


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_a_gpu_that_is_not_there_cannot_be_tuned_for() -> None:
    with pytest.raises(InvalidTarget, match="not present"):
        tune(PROBLEM, **{**QUICK, "device": "cuda:0"})
    with pytest.raises(InvalidTarget, match="not present"):
        tune(PROBLEM, NAMED_TARGETS["sm_90"], trials=1)


def test_another_cpu_than_the_one_at_hand_cannot_be_tuned_for(cpu: Target) -> None:
    with pytest.raises(InvalidTarget, match="target Test CPU is not the device at hand"):
        tune(PROBLEM, cpu, trials=1)
