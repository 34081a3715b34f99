"""Candidates that do harm, in real processes: the search outlives them, and says what became of each."""

import os
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from fake_benches import HARM, cuda_errors, fake_time, harmful

from hsa_compile.autotune.bench.isolation import IsolatedBench, LibraryBuilder, WorkerProcess
from hsa_compile.autotune.evaluate import Outcome
from hsa_compile.autotune.options import Limits
from hsa_compile.autotune.tune import tune
from hsa_compile.errors import (
    CandidateCrashed,
    CandidateError,
    CompileError,
    CompilerCrashed,
    CompileTimedOut,
    HSACompileError,
    InvalidArgument,
    NotFinite,
    OutOfMemory,
    TimedOut,
    WrongResult,
)
from hsa_compile.problem import Problem
from hsa_compile.schedules.space import SearchSpace, default_schedule
from hsa_compile.target import Target

PROBLEM = Problem(seq_len=1031, num_heads=2, num_kv_heads=1, head_dim=8, chunk_size=16, top_k=2)
MEMORY = 1 << 30


@pytest.mark.exhaustive
def test_a_search_outlives_seven_hostile_candidates_finds_the_good_one_and_counts_them_by_kind() -> None:
    target = Target.parse("cpu")
    default = default_schedule(PROBLEM, target)
    valid = list(SearchSpace.of(PROBLEM, target).schedules())
    assert len(harmful(PROBLEM, target)) == len(HARM) < len(valid) - 3
    record = tune(
        PROBLEM,
        device="cpu",
        trials=1000,
        timeout=600.0,
        sampler="random",
        bench="fake_benches:HostileBench",
        limits=Limits(compile_s=30.0, run_s=30.0, memory_bytes=MEMORY),
    )
    assert record.trials == len(valid)
    assert record.failures == {
        "CandidateCrashed": 1,  # the segmentation fault
        "TimedOut": 1,
        "CompileTimedOut": 1,
        "OutOfMemory": 1,
        "WrongResult": 1,
        "NotFinite": 1,
        "CandidateError": 1,
    }
    good = [schedule for schedule in valid if schedule not in harmful(PROBLEM, target)]
    assert record.schedule == min(good, key=lambda schedule: fake_time(schedule, default))


@pytest.mark.slow
def test_a_search_outlives_a_worker_that_dies_in_the_play_off_and_keeps_the_best_of_the_others() -> None:
    target = Target.parse("cpu")
    default = default_schedule(PROBLEM, target)
    *_, second, fatal = sorted(
        SearchSpace.of(PROBLEM, target).schedules(), key=lambda schedule: -fake_time(schedule, default)
    )
    record = tune(PROBLEM, device="cpu", trials=1000, timeout=600.0, bench="fake_benches:FatalInPlayOff")
    assert (record.schedule, record.failures) == (second, {})
    assert f"dropped from the play-off: {fatal} (CandidateCrashed: its process died of SIGSEGV)" in record.verdict


@pytest.mark.exhaustive
def test_a_search_outlives_every_error_that_a_gpu_gives_and_counts_them_by_kind() -> None:
    pytest.importorskip("triton")
    target = Target.parse("cpu")
    valid = list(SearchSpace.of(PROBLEM, target).schedules())
    kinds = Counter(kind for _, kind in cuda_errors().values())
    record = tune(
        PROBLEM,
        device="cpu",
        trials=1000,
        timeout=600.0,
        sampler="random",
        bench="fake_benches:CudaBench",
    )
    assert record.trials == len(valid) > kinds.total() + 1
    assert record.failures == kinds


@pytest.fixture(scope="module")
def shared_worker() -> WorkerProcess:
    """A worker for tests that leave it alive."""
    return WorkerProcess("fake_benches:DyingBench", ("hello",))


@pytest.fixture
def worker(shared_worker: WorkerProcess) -> WorkerProcess:
    assert shared_worker.alive
    return shared_worker


@pytest.fixture(scope="module", autouse=True)
def _close(shared_worker: WorkerProcess):
    yield
    shared_worker.close()


def test_a_worker_is_another_process_that_answers(worker: WorkerProcess) -> None:
    greeting, _, pid = worker.call("greet", "you", timeout_s=60).rpartition(" from ")
    assert greeting == "hello, you,"
    assert int(pid) != os.getpid()


def test_what_a_candidate_prints_goes_nowhere(worker: WorkerProcess, capfd: pytest.CaptureFixture[str]) -> None:
    assert worker.call("chat", timeout_s=60) == "done"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("compile", CompileError),
        ("wrong", WrongResult),
        ("nan", NotFinite),
        ("memory", OutOfMemory),
        ("disk", CandidateCrashed),
    ],
)
def test_an_error_with_a_name_here_comes_back_by_it_and_the_worker_lives(
    name: str, error: type[HSACompileError], worker: WorkerProcess
) -> None:
    with pytest.raises(HSACompileError) as raised:
        worker.call("fail", name, timeout_s=60)
    assert type(raised.value) is error
    assert worker.alive


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "arguments", "error", "text"),
    [
        pytest.param("crash", (), CandidateCrashed, "died of SIGSEGV", marks=pytest.mark.exhaustive),  # also below
        pytest.param("leave", (3,), CandidateCrashed, "left with code 3", marks=pytest.mark.exhaustive),
        pytest.param("fail", ("bug",), CandidateError, "KeyError: 'a bug'", marks=pytest.mark.exhaustive),
        ("fail", ("cuda",), CandidateError, "^RuntimeError: CUDA error: an illegal memory access was encountered$"),
        ("spin", (), TimedOut, "killed after 1 s"),
        ("kill", (), OutOfMemory, "was killed, as Linux does where memory runs out"),
    ],
)
def test_a_death_is_told_by_its_cause(
    verb: str, arguments: tuple[object, ...], error: type[HSACompileError], text: str
) -> None:
    worker = WorkerProcess("fake_benches:DyingBench", ("hello",))
    worker.wait_until_open()
    with pytest.raises(HSACompileError, match=text) as raised:
        worker.call(verb, *arguments, timeout_s=1 if verb == "spin" else 60)
    assert type(raised.value) is error
    assert not worker.alive
    worker.close()  # again, to no harm


@pytest.mark.slow
def test_a_worker_that_cannot_start_says_why() -> None:
    worker = WorkerProcess("fake_benches:broken_bench", ())
    with pytest.raises(HSACompileError, match="worker process cannot start: RuntimeError: no bench today"):
        worker.wait_until_open()


@pytest.mark.slow
def test_a_worker_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    import subprocess

    script = """
import os, sys, time
from hsa_compile.autotune.bench.isolation import WorkerProcess
worker = WorkerProcess("fake_benches:DyingBench", ("hello",))
print(worker.call("greet", "you", timeout_s=60).rpartition(" ")[2], flush=True)
worker._connection.send(("spin", ()))
time.sleep(600)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    while is_running(pid):  # for ever, if it does not die
        time.sleep(0.01)


@pytest.mark.slow
def test_a_worker_outlives_the_thread_that_asked_for_it() -> None:
    with ThreadPoolExecutor(1) as threads:
        worker = threads.submit(WorkerProcess, "fake_benches:DyingBench", ("hello",)).result()
        threads.submit(worker.wait_until_open).result()  # from then on it dies with the thread that started it
    assert worker.call("greet", "you", timeout_s=60).startswith("hello, you, from ")
    worker.close()


def test_what_is_no_text_in_the_path_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    sys.path.insert(0, tmp_path)  # type: ignore[arg-type]
    worker = WorkerProcess("fake_benches:DyingBench", ("hello",))
    assert worker.call("chat", timeout_s=60) == "done"
    worker.close()


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.slow
def test_a_replaced_worker_has_what_it_needs_prepared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target.parse("cpu")
    default = default_schedule(PROBLEM, target)
    harm = harmful(PROBLEM, target)
    crashing = next(schedule for schedule, kind in harm.items() if kind == "segfault")
    arguments = (PROBLEM, target, "cpu", "random", 0)
    with IsolatedBench("fake_benches:HostileBench", arguments, limits=Limits(memory_bytes=MEMORY)) as bench:
        bench.prepare(default)
        with pytest.raises(CandidateCrashed, match="died of SIGSEGV"):
            bench.prepare(crashing)
        assert bench.time([default, default], 2) == [[1.0, 1.0], [1.0, 1.0]]  # it asserts that they are prepared


@pytest.mark.parametrize("name", ["compile_s", "run_s", "first_s", "memory_bytes"])
def test_a_limit_must_be_positive(name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"{name} = 0 must be more than 0"):
        Limits(**{name: 0})


def test_a_library_is_built_within_the_limit_for_compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "c++"
    program.write_text("#!/bin/sh\nsleep 600\n")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    target = Target(kind="cpu", name="A CPU", arch="avx2", num_cores=2, has_compiler=True)
    problem = replace(PROBLEM, top_k=1)  # nobody has built that one
    builder = LibraryBuilder(problem, target, Limits(compile_s=0.01))
    with pytest.raises(CompileTimedOut, match="was killed after 0 s"):
        builder.compile(default_schedule(problem, target))
    builder.close()
    with pytest.raises(CompilerCrashed, match="the search has ended"):
        builder.compile(default_schedule(problem, target))


def test_an_outcome_is_times_or_a_failure() -> None:
    with pytest.raises(InvalidArgument, match="a failure or pairs of times"):
        Outcome(stage="full")
    with pytest.raises(InvalidArgument, match="a failure or pairs of times"):
        Outcome(stage="full", times_ms=(1.0,), default_times_ms=(1.0, 2.0))
    with pytest.raises(InvalidArgument, match="a time = nan must be a number"):
        Outcome(stage="full", times_ms=(float("nan"),), default_times_ms=(1.0,))


def test_a_ratio_is_the_median_over_rounds() -> None:
    outcome = Outcome(stage="full", times_ms=(2.0, 3.0, 9.0), default_times_ms=(2.0, 2.0, 3.0))
    assert outcome.ratio == 1.5
    assert outcome.median_ms == 3.0
