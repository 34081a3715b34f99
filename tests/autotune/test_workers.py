"""Several processes on one study: each trial once, and as many more trials a minute."""

import contextlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import optuna
import postgres
import pytest
from fake_benches import BARRIER, LOG, SLEEP_S
from optuna.trial import FrozenTrial

from hsa_compile.autotune.device_lock import device_lock
from hsa_compile.autotune.storage import close_storage, open_storage
from hsa_compile.autotune.trial_states import OUTCOME
from hsa_compile.autotune.tune import tune
from hsa_compile.problem import Problem

SLEEP = 1.5
SCRIPT = """
import sys
from hsa_compile.autotune.tune import tune
from hsa_compile.problem import Problem
problem = Problem(seq_len=131072, num_heads=4, num_kv_heads=1, head_dim=64, top_k=8)
print(tune(
    problem, device="cpu", trials=int(sys.argv[2]), timeout=3000.0, sampler="random", isolate=False,
    storage=sys.argv[1], bench="fake_benches:open_fake",
).schedule)
"""


@pytest.fixture(params=["journal", "postgresql"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        if request.param == "journal":
            yield str(tmp_path / "study.journal")
        else:
            yield stack.enter_context(postgres.server())


def run_workers(count: int, trials: int, address: str, directory: Path) -> tuple[list[FrozenTrial], list[str]]:
    """All trials of the study that `count` processes made together, and the schedules that they compiled."""
    directory.mkdir()
    (directory / "met").mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        SLEEP_S: str(SLEEP),
        LOG: str(directory / "log"),
        BARRIER: f"{count} {directory / 'met'}",
    }
    command = [sys.executable, "-c", SCRIPT, address, str(trials)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(count)
    ]
    for process in processes:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert out.startswith("chunk ") or out.startswith("token ")
    storage = open_storage(address)
    study = storage.get_all_studies()[-1]
    trials = optuna.load_study(study_name=study.study_name, storage=storage).trials
    close_storage(storage)
    return trials, (directory / "log").read_text().splitlines()


def trials_a_minute(trials: list[FrozenTrial]) -> float:
    """Of those after the default, which is measured by all workers before they begin."""
    counted = [trial for trial in trials if OUTCOME in trial.user_attrs][1:]
    starts = [trial.datetime_start for trial in counted if trial.datetime_start]
    ends = [trial.datetime_complete for trial in counted if trial.datetime_complete]
    assert len(starts) == len(ends) == len(counted)
    return 60 * len(counted) / (max(ends) - min(starts)).total_seconds()


@pytest.mark.slow
def test_four_processes_try_each_point_once_and_more_a_minute_than_one(address: str, tmp_path: Path) -> None:
    alone, _ = run_workers(1, 7, address, tmp_path / "alone")
    trials, compiled = run_workers(4, 33, address, tmp_path / "four")  # the next study: the first one's search ended
    tried = [trial for trial in trials if OUTCOME in trial.user_attrs]
    assert len(tried) == 33
    assert all(trial.state.is_finished() for trial in trials)
    times_compiled = Counter(compiled)
    default = next(name for name, count in times_compiled.items() if count == 4)
    del times_compiled[default]  # each worker compares with it
    assert len(times_compiled) == 32
    assert max(times_compiled.values()) == 1
    # More than 3 times where the cores are free; a loaded machine gives less, and that is no fault of the search.
    assert trials_a_minute(trials) >= 1.5 * trials_a_minute(alone)


@pytest.mark.slow
def test_two_workers_of_one_process_share_the_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOG, str(tmp_path / "log"))
    problem = Problem(seq_len=131072, num_heads=4, num_kv_heads=1, head_dim=64, top_k=8)
    record = tune(
        problem, device="cpu", trials=12, timeout=600.0, sampler="random", workers=2, bench="fake_benches:open_fake"
    )
    assert record.trials == 12
    compiled = Counter((tmp_path / "log").read_text().splitlines())
    assert len(compiled) == 12
    assert sorted(compiled.values()) == [1] * 11 + [2]  # the default, by each worker


def test_a_device_is_locked_for_others_and_free_for_its_holder() -> None:
    script = """
import filelock
from hsa_compile.autotune.device_lock import device_lock
try:
    with device_lock("cpu").acquire(timeout=0.1):
        print("free")
except filelock.Timeout:
    print("locked")
"""

    def another_finds() -> str:
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()

    lock = device_lock("cpu")
    with lock, lock:
        assert another_finds() == "locked"
    assert another_finds() == "free"
