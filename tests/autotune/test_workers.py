"""Several processes on one study: each trial once, and all of them at the same time."""

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import forked
import optuna
import postgres
import pytest
from fake_benches import BARRIER, LOG, FakeBench

from hsa_compile.autotune.bench.device import device_lock
from hsa_compile.autotune.study.storage import close_storage, open_storage
from hsa_compile.autotune.study.trials import OUTCOME, OWNER
from hsa_compile.autotune.tune import tune
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Schedule

PROBLEM = Problem(seq_len=131072, num_heads=4, num_kv_heads=1, head_dim=64, top_k=8)
SCRIPT = """
import sys
from test_workers import search
search(sys.argv[1], int(sys.argv[2]))
"""


def search(address: str, trials: int) -> None:
    """What each process does."""
    tune(
        PROBLEM, device="cpu", trials=trials, timeout=3000.0, sampler="random", isolate=False, storage=address,
        bench="fake_benches:open_fake",
    )  # fmt: skip


def assert_each_point_once(address: str, trials: int, log: Path) -> None:
    """By four processes that all met while each compiled a candidate of its own."""
    storage = open_storage(address)
    (name,) = optuna.get_all_study_names(storage)
    found = optuna.load_study(study_name=name, storage=storage).trials
    close_storage(storage)
    assert all(trial.state.is_finished() for trial in found)
    tried = [trial for trial in found if OUTCOME in trial.user_attrs]
    assert len(tried) == trials
    times_compiled = Counter(log.read_text().splitlines())
    default = next(name for name, count in times_compiled.items() if count == 4)
    del times_compiled[default]  # each worker compares with it
    assert len(times_compiled) == trials - 1
    assert max(times_compiled.values()) == 1
    assert len({trial.user_attrs[OWNER]["pid"] for trial in tried}) == 4


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is compiled; no process gets beyond its first candidate before four have one."""
    (tmp_path / "met").mkdir()
    monkeypatch.setenv(BARRIER, f"4 {tmp_path / 'met'}")
    monkeypatch.setenv(LOG, str(tmp_path / "log"))
    return tmp_path / "log"


def test_four_processes_work_at_the_same_time_and_try_each_point_once(log: Path, tmp_path: Path) -> None:
    address = str(tmp_path / "study.journal")
    processes = [forked.start(lambda: search(address, 12)) for _ in range(4)]
    assert [forked.wait(pid) for pid in processes] == [0] * 4
    assert_each_point_once(address, 12, log)


def test_one_of_four_processes_that_is_killed_costs_no_more_than_its_own_candidate(log: Path, tmp_path: Path) -> None:
    def search_and_die() -> None:
        def prepare(bench: FakeBench, schedule: Schedule) -> str:
            return forked.die() if schedule != bench.default else ""  # the others wait for it until it comes so far

        FakeBench.prepare = prepare  # type: ignore[method-assign] (in this process alone)
        search(address, 12)

    address = str(tmp_path / "study.journal")
    killed, *others = [forked.start(work) for work in (search_and_die, *[lambda: search(address, 12)] * 3)]
    assert [forked.wait(pid) for pid in (killed, *others)] == [-signal.SIGKILL, 0, 0, 0]
    storage = open_storage(address)
    (name,) = optuna.get_all_study_names(storage)
    found = optuna.load_study(study_name=name, storage=storage).trials
    assert all(trial.state.is_finished() for trial in found)
    assert len([trial for trial in found if OUTCOME in trial.user_attrs]) == 12
    counts = sorted(Counter(log.read_text().splitlines()).values())
    assert counts[:-2] == [1] * (len(counts) - 2)  # all but the default, and what the killed one had begun
    assert counts[-2] <= 2


@pytest.mark.exhaustive
def test_four_processes_share_a_database(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    with postgres.server() as address:
        command = [sys.executable, "-c", SCRIPT, address, "33"]
        processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
        for process in processes:
            _, err = process.communicate()
            assert process.returncode == 0, err
        assert_each_point_once(address, 33, log)


@pytest.mark.slow
def test_two_workers_of_one_process_share_the_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOG, str(tmp_path / "log"))
    record = tune(
        PROBLEM, device="cpu", trials=12, timeout=600.0, sampler="random", workers=2, bench="fake_benches:open_fake"
    )
    assert record.trials == 12
    compiled = Counter((tmp_path / "log").read_text().splitlines())
    assert len(compiled) == 12
    assert sorted(compiled.values()) == [1] * 11 + [2]  # the default, by each worker


def test_a_device_is_locked_for_others_and_free_for_its_holder() -> None:
    def look() -> None:
        device_lock("cpu").acquire(timeout=0)  # raises if it is locked

    lock = device_lock("cpu")
    with lock, lock:
        assert forked.wait(forked.start(look)) == 1
    assert forked.wait(forked.start(look)) == 0
