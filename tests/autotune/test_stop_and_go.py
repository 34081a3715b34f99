"""A search that is killed goes on as if it had not been: at each kind of moment, and whole processes at random ones."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import forked
import optuna
import pytest
from fake_benches import SLEEP_S, FakeBench
from optuna.trial import Trial

from hsa_compile.autotune.study.storage import FINISHED, open_storage
from hsa_compile.autotune.study.trials import OUTCOME
from hsa_compile.autotune.tune import Progress, tune
from hsa_compile.problem import Problem
from hsa_compile.schedules.cache import ScheduleCache
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.store import read_records

KILLS, TRIALS = 20, 24
PROBLEM = Problem(seq_len=131072, num_heads=4, num_kv_heads=1, head_dim=64, top_k=8)

SCRIPT = f"""
import sys
from pathlib import Path
from hsa_compile.autotune.tune import tune
from hsa_compile.problem import Problem
from hsa_compile.schedules.cache import default_cache
directory, isolate, sampler = Path(sys.argv[1]), sys.argv[2] == "isolated", sys.argv[3]
problem = Problem(seq_len=131072, num_heads=4, num_kv_heads=1, head_dim=64, top_k=8)
print("begins", flush=True)
record = tune(
    problem, device="cpu", trials={TRIALS}, timeout=3000.0, seed=5, sampler=sampler, isolate=isolate,
    storage=str(directory / "study.journal"), ledger=directory / "ledger.jsonl",
    bench="fake_benches:open_fake", on_record=default_cache().put,
)
print(record.schedule, flush=True)
"""


@dataclass(frozen=True)
class Run:
    """A search in a directory of its own, by a process that may be killed."""

    directory: Path
    isolate: bool
    sampler: str = "ours"

    def start(self) -> "subprocess.Popen[str]":
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HSA_COMPILE_CACHE_DIR": str(self.directory / "cache"),
            "CXX": "there-is-no-such-compiler",
            SLEEP_S: "0.03",
        }
        how = "isolated" if self.isolate else "here"
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(self.directory), how, self.sampler],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def finish(self) -> float:
        """Runs to the end; the seconds of the search, without those of imports."""
        process = self.start()
        assert process.stdout is not None
        process.stdout.readline()
        start = time.monotonic()
        _, err = process.communicate()
        assert process.returncode == 0, err
        return time.monotonic() - start

    def trials(self) -> list[tuple[int, dict[str, object], float | None]]:
        """Number, parameters and value of each finished trial with an outcome; empty if there is no study yet."""
        path = self.directory / "study.journal"
        if not path.exists():
            return []
        storage = open_storage(str(path))
        studies = storage.get_all_studies()
        assert len(studies) <= 1, "a search that is not finished has one study"
        return [
            (trial.number, trial.params, trial.value)
            for frozen in studies
            for trial in optuna.load_study(study_name=frozen.study_name, storage=storage).trials
            if trial.state.is_finished() and OUTCOME in trial.user_attrs
        ]

    def has_ended(self) -> bool:
        """Whether the search came to its end, though its process may have been killed on its way out."""
        path = self.directory / "study.journal"
        return path.exists() and any(
            FINISHED in study.user_attrs for study in open_storage(str(path)).get_all_studies()
        )

    def winner(self) -> Schedule:
        """The schedule that was stored."""
        (path,) = (self.directory / "cache" / "schedules").glob("*.json")
        (record,) = read_records(path)[0].values()
        return record.schedule

    def damages(self) -> list[str]:
        """What is wrong with the schedule files; nothing, if all is well."""
        files = (self.directory / "cache" / "schedules").glob("*.json")
        return [damage for path in files for damage in read_records(path)[1]]


def search_here(directory: Path, sampler: str) -> None:
    """The same in this process, with fewer trials."""
    tune(
        PROBLEM, device="cpu", trials=9, timeout=3000.0, seed=5, sampler=sampler, isolate=False,
        storage=str(directory / "study.journal"), ledger=directory / "ledger.jsonl", bench="fake_benches:open_fake",
        on_record=ScheduleCache(directory / "cache" / "schedules").put, on_progress=lambda progress: told(progress),
    )  # fmt: skip


def told(progress: Progress) -> None:
    """A moment to be killed at: right after a candidate was told."""


def dying_in(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, *, call: int, after: bool) -> None:
    """Lets this process die in a call of a method or function, by number; before what it does or after."""
    original, calls = getattr(owner, name), 0

    def deadly(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            forked.die()
        result = original(*arguments, **options)
        if calls == call:
            forked.die()
        return result

    monkeypatch.setattr(owner, name, deadly)


@pytest.mark.parametrize("sampler", ["ours", "tpe", "random"])
def test_killed_at_each_kind_of_moment_it_tells_the_same_trials_and_stores_the_same_schedule(
    sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = (Run(tmp_path / name, False, sampler) for name in ("whole", "killed"))
    for run in (whole, killed):
        run.directory.mkdir()
    search_here(whole.directory, sampler)
    before: list[tuple[int, dict[str, object], float | None]] = []
    for owner, name, call, after in (
        (FakeBench, "compile", 1, False),  # nothing is timed yet
        (FakeBench, "prepare", 4, True),  # half a candidate; the default is measured anew by each process
        (Trial, "set_user_attr", 5, True),  # its outcome may be stored and not told
        (sys.modules[__name__], "told", 2, False),
        (ScheduleCache, "put", 1, False),  # all is tried, nothing stored
        (ScheduleCache, "put", 1, True),  # all is stored, and the study is not marked as done
    ):
        with monkeypatch.context() as patch:
            dying_in(patch, owner, name, call=call, after=after)
            assert forked.wait(forked.start(lambda: search_here(killed.directory, sampler))) == -signal.SIGKILL, name
        after_kill = killed.trials()
        assert after_kill[: len(before)] == before, "a finished trial is lost or changed"
        assert killed.damages() == []
        before = after_kill
    assert not killed.has_ended()
    search_here(killed.directory, sampler)
    assert killed.has_ended()
    assert len(whole.trials()) == 9
    assert killed.trials() == whole.trials()
    assert killed.winner() == whole.winner()


def kill_at_random(run: Run, generator: random.Random, longest_s: float) -> bool:
    """Starts a search and kills it after a while; whether it was still running then."""
    process = run.start()
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(generator.uniform(0, longest_s))
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return running


@pytest.fixture(scope="module", params=["here", "isolated"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, float]:
    """A search that nobody killed, and how long it took."""
    run = Run(tmp_path_factory.mktemp("whole"), request.param == "isolated")
    return run, run.finish()


@pytest.mark.exhaustive
def test_after_any_kill_no_trial_is_lost_or_repeated_and_the_same_schedule_wins(
    whole: tuple[Run, float], tmp_path: Path
) -> None:
    reference, whole_s = whole
    expected, winner = reference.trials(), reference.winner()
    assert len(expected) == TRIALS
    generator = random.Random(7)
    kills = searches = 0
    while kills < KILLS // 2:
        run = Run(tmp_path / str(searches), reference.isolate)
        run.directory.mkdir()
        before: list[tuple[int, dict[str, object], float | None]] = []
        while kills < KILLS // 2 and not run.has_ended():
            kills += kill_at_random(run, generator, whole_s)
            after = run.trials()
            assert after[: len(before)] == before, "a finished trial is lost or changed"
            assert run.damages() == []
            before = after
        if not run.has_ended():
            run.finish()
        assert run.trials() == expected
        assert run.damages() == []
        assert run.winner() == winner
        searches += 1


@pytest.mark.exhaustive
def test_every_sampler_goes_on_as_if_it_had_not_been_killed(tmp_path: Path) -> None:
    for sampler in ("tpe", "random"):
        whole, killed = (Run(tmp_path / f"{sampler}-{name}", False, sampler) for name in ("whole", "killed"))
        for run in (whole, killed):
            run.directory.mkdir()
        whole.finish()
        for seed in range(2):
            if not killed.has_ended():
                kill_at_random(killed, random.Random(seed), 1.0)
        if not killed.has_ended():
            killed.finish()
        assert killed.winner() == whole.winner()
        assert killed.trials() == whole.trials()
