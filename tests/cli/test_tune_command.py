"""`tune` and its neighbours where a search is interrupted, goes on, is planned or shown."""

import contextlib
import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from shell import Shell

from hsa_compile.autotune.bench import bench as bench_module
from hsa_compile.autotune.evaluate import Outcome, evaluate
from hsa_compile.autotune.play_off import Verdict, play_off
from hsa_compile.autotune.sweeps import RecordedSweep
from hsa_compile.autotune.tune import Progress
from hsa_compile.autotune.tune import tune as tune_problem
from hsa_compile.cli.options import stop_on_ctrl_c
from hsa_compile.errors import TimedOut, WrongResult
from hsa_compile.kernels.emit import emit
from hsa_compile.model.cost.workload import problems
from hsa_compile.model.presets import preset
from hsa_compile.problem import Problem
from hsa_compile.schedules.cache import ScheduleCache, default_cache
from hsa_compile.schedules.record import TuningRecord
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace, default_schedule
from hsa_compile.target import Target

SHAPE = [
    "--seq-len", "130", "--heads", "4", "--kv-heads", "1", "--head-dim", "16", "--chunk-size", "16", "--top-k", "2",
    "--op", "forward", "--device", "cpu",
]  # fmt: skip
FIELDS = {"seq_len": 130, "num_heads": 4, "num_kv_heads": 1, "head_dim": 16, "chunk_size": 16, "top_k": 2}
TUNE = ["tune", *SHAPE, "--trials", "6", "--timeout", "600", "--in-process", "--sampler", "random"]


@pytest.fixture(autouse=True)
def _made_up_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates are checked, and none is run to see how long it takes."""
    monkeypatch.setattr(bench_module, "measure", lambda calls, device, rounds: [[1.0] * rounds for _ in calls])


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many candidates there were after each of those that this test's searches tried."""
    counts: list[int] = []

    def spy(*arguments: Any, on_progress: Any, **options: Any) -> TuningRecord:
        def show(progress: Progress) -> None:
            counts.append(progress.tried)
            on_progress(progress)

        return tune_problem(*arguments, on_progress=show, **options)

    monkeypatch.setattr("hsa_compile.autotune.tune.tune", spy)
    return counts


@pytest.fixture
def interrupting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ctrl-C when so many candidates were tried; none while the list is empty."""
    after: list[int] = []

    def spy(*arguments: Any, on_progress: Any, **options: Any) -> TuningRecord:
        def show(progress: Progress) -> None:
            on_progress(progress)
            if progress.tried in after:
                os.kill(os.getpid(), signal.SIGINT)

        return tune_problem(*arguments, on_progress=show, **options)

    monkeypatch.setattr("hsa_compile.autotune.tune.tune", spy)
    return after


WRITTEN = (
    "select_chunks B2 T63 HQ2 H2 D16 C8 K3 float32 S256 R8 noise",
    "hsa_decode B2 T1 HQ4 H1 D16 C16 K2 float32 S256",
)
PROBLEMS = tuple(word for text in WRITTEN for word in ("--problem", text))


def test_problems_are_tuned_as_warnings_write_them(run: Shell) -> None:
    planned = ["plan", "--device", "cpu", *PROBLEMS, "--json"]
    assert [(row["problem"], row["cached"]) for row in run(*planned).json] == [(text, "no") for text in WRITTEN]
    assert run("tune", *TUNE[TUNE.index("--device") :], *PROBLEMS).code == 0
    stored = default_cache().entries()
    assert tuple(record.problem.describe() for origin, record in stored if origin == "user") == WRITTEN
    assert [(row["problem"], row["cached"]) for row in run(*planned).json] == [(text, "yes") for text in WRITTEN]


def test_every_command_about_problems_reads_them_as_warnings_write_them(run: Shell) -> None:
    explained = run("schedules", "explain", "--device", "cpu", *PROBLEMS, "--json").json
    assert tuple(Problem(**row["problem"]).describe() for row in explained) == WRITTEN
    emitted = run("emit", "--target", "sm_90", *PROBLEMS)
    target = Target.parse("sm_90")
    written = [Problem.parse(text) for text in WRITTEN]
    texts = [emit(problem, default_schedule(problem, target), target).text for problem in written]
    assert emitted.out == "".join(texts)
    for command in (["tune"], ["plan"], ["schedules", "explain"], ["emit"], ["inspect"]):
        wrong = run(*command, "--problem", "hsa_forwards")
        assert wrong.code == 2
        assert "has a word that no problem has: 'hsa_forwards'" in wrong.err


def test_a_plan_for_a_model_has_its_problems(run: Shell) -> None:
    rows = run("plan", "--device", "cpu", "--preset", "tiny", "--seq-len", "512", "--batch", "2", "--json").json
    expected = problems(preset("tiny"), 2, 512, "float32", training=True)
    assert [row["problem"] for row in rows][: len(expected)] == [problem.describe() for problem in expected]


def test_ctrl_c_stores_the_best_so_far_and_the_same_command_goes_on(run: Shell, interrupting: list[int]) -> None:
    interrupting.append(5)
    stopped = run(*TUNE)
    assert stopped.code == 130
    assert "interrupted; what was finished is stored, run the same command to go on" in stopped.err.splitlines()[-1]
    (entry,) = run("schedules", "list", "--json").json
    assert (entry["complete"], entry["trials"]) == (False, 5)
    interrupting.clear()
    done = run(*TUNE)
    assert done.code == 0
    assert "cached" not in done.err
    (entry,) = run("schedules", "list", "--json").json
    assert (entry["complete"], entry["trials"]) == (True, 6)
    assert "cached (--force tunes again)" in run(*TUNE).err


def test_ctrl_c_in_the_play_off_stores_its_winner_and_tunes_no_other(
    run: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> Verdict:
        os.kill(os.getpid(), signal.SIGINT)
        return play_off(*arguments, **options)

    two = [*TUNE, "--top-k", "1,2"]
    with monkeypatch.context() as patch:
        patch.setattr("hsa_compile.autotune.tune.play_off", interrupted)
        stopped = run(*two)
    assert stopped.code == 130
    (entry,) = run("schedules", "list", "--json").json
    assert (entry["problem"]["top_k"], entry["complete"], entry["measurement"]["repeats"]) == (1, True, 9)
    assert "[the default stays" in stopped.err
    monkeypatch.setattr("hsa_compile.autotune.tune.play_off", interrupted)
    assert run(*two).code == 130
    assert len(run("schedules", "list", "--json").json) == 2


def test_ctrl_c_while_a_stored_schedule_is_found_ends_the_command(run: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*TUNE).code == 0
    finished = ScheduleCache.finished

    def interrupted(*arguments: Any) -> TuningRecord | None:
        os.kill(os.getpid(), signal.SIGINT)
        return finished(*arguments)

    monkeypatch.setattr(ScheduleCache, "finished", interrupted)
    stopped = run(*TUNE, "--top-k", "2,1")
    assert stopped.code == 130
    assert "cached" in stopped.err


def test_an_interrupted_force_does_not_push_out_a_whole_search(run: Shell, interrupting: list[int]) -> None:
    assert run(*TUNE).code == 0
    interrupting.append(5)
    assert run(*TUNE, "--force").code == 130
    (entry,) = run("schedules", "list", "--json").json
    assert (entry["complete"], entry["trials"]) == (True, 6)


def test_a_search_that_tried_almost_nothing_is_not_stored_and_goes_on(run: Shell, interrupting: list[int]) -> None:
    interrupting.append(2)
    assert run(*TUNE).code == 130
    interrupting.clear()
    few = run(*TUNE, "--trials", "3")
    assert few.code == 0
    assert re.search(r"nothing is stored: only 3 of \d+ candidates were timed, 5 are needed", few.err)
    assert "stored in" not in few.out
    assert run("schedules", "list", "--json").json == []
    assert "nothing is stored: --trials 3 is too few, 5 are needed" in run("plan", *SHAPE, "--trials", "3").out
    assert "from      the default" in run("schedules", "explain", *SHAPE).out
    done = run(*TUNE)
    assert "stored in" in done.out
    assert re.search(r"best of 6 timed", done.err)
    assert re.search(r"expected to lose  none: .* 6 candidates", run("schedules", "explain", *SHAPE).out)


def test_the_ledger_spares_a_later_search_what_an_earlier_one_timed(run: Shell, tried: list[int]) -> None:
    assert run(*TUNE).code == 0
    assert tried == [1, 2, 3, 4, 5, 6]
    tried.clear()
    run("schedules", "clear", "--yes")
    assert run(*TUNE, "--trials", "2").code == 0
    assert tried == [7, 8]
    tried.clear()
    assert run(*TUNE, "--trials", "2", "--force").code == 0
    assert tried == [1, 2]


def test_a_record_says_how_sure_it_is(run: Shell) -> None:
    (record,) = run(*TUNE, "--json").json
    assert record["confidence"] == 0.95
    assert "default" in record["verdict"]
    assert record["schedule"] in record["tie_set"]
    assert record["clocks_mhz"] is None


def test_a_plan_counts_what_is_left_to_do(run: Shell) -> None:
    (before,) = run("plan", *SHAPE, "--trials", "6", "--json").json
    assert (before["trials"], before["cached"]) == (6, "no")
    assert before["candidates"] > 6
    assert 0 < before["minutes"] <= 55 / 60
    run(*TUNE)
    (after,) = run("plan", *SHAPE, "--trials", "6", "--json").json
    assert (after["trials"], after["cached"], after["minutes"]) == (0, "yes", 0)
    assert after["timed before"] == 6
    (other,) = run("plan", *SHAPE, "--trials", "6", "--inputs", "local", "--json").json
    assert (other["trials"], other["timed before"], other["cached"]) == (6, 0, "no")
    (anew,) = run("plan", *SHAPE, "--trials", "6", "--force", "--json").json
    assert (anew["trials"], anew["timed before"], anew["cached"]) == (6, 0, "no")
    run("schedules", "clear", "--yes")
    many = str(before["candidates"])
    (rest,) = run("plan", *SHAPE, "--trials", many, "--json").json
    assert (rest["trials"], rest["timed before"], rest["cached"]) == (before["candidates"] - 6, 6, "no")


def test_what_was_tuned_on_other_inputs_is_tuned_again(run: Shell) -> None:
    assert run(*TUNE, "--inputs", "local").code == 0
    assert "cached (--force tunes again)" in run(*TUNE, "--inputs", "local").err
    assert "cached (--force tunes again)" in run(*TUNE).err
    assert "cached" not in run(*TUNE, "--inputs", "random").err
    (entry,) = run("schedules", "list", "--json").json
    assert entry["inputs"] == "random"
    (again,) = run("plan", *SHAPE, "--trials", "6", "--force", "--json").json
    assert (again["trials"], again["cached"]) == (6, "no")


@pytest.mark.slow
def test_a_whole_process_that_gets_ctrl_c_stops_cleanly_with_its_workers() -> None:
    command = [sys.executable, "-m", "hsa_compile", *TUNE]
    command.remove("--in-process")
    command[command.index("6")] = "500"
    terminal, stderr = pty.openpty()  # on which there is a bar, if it has a size
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
    os.close(stderr)
    err = ""
    while "best" not in err:  # in the bar, after the first candidate
        assert process.poll() is None, err
        err += os.read(terminal, 4096).decode()
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # Linux says so at the end
        while part := os.read(terminal, 4096).decode():
            err += part
    os.close(terminal)
    assert process.wait() == 130, err
    assert "run the same command to go on" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_ctrl_c_in_the_middle_of_a_line_is_heard_and_answered(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Stderr(io.StringIO):
        """In the middle of a line: Python's own refuses another one in the same words."""

        def write(self, text: str) -> int:
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    monkeypatch.setattr(sys, "stderr", Stderr())
    with stop_on_ctrl_c() as stopped:
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped.is_set()
    assert "stopping: the candidate at hand" in capfd.readouterr().err


def test_a_recorded_sweep_holds_every_candidate_and_goes_on_where_it_was_stopped(
    run: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "sweeps" / "forward.json.gz"
    evaluated: list[Schedule] = []

    def spy(schedule: Schedule, *rest: Any, **options: Any) -> Outcome:
        evaluated.append(schedule)
        if len(evaluated) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(schedule, *rest, **options)

    monkeypatch.setattr("hsa_compile.autotune.sweeps.evaluate", spy)
    record = ["tune", *SHAPE, "--record", str(file)]
    assert run(*record).code == 130
    assert not file.exists()
    done = run(*record)
    assert done.code == 0
    sweep = RecordedSweep.load(file)
    assert f"{len(sweep.points)} candidates in {file}" in done.out
    assert len(set(evaluated)) == len(evaluated) == len(sweep.points) - 1  # the default is timed apart
    assert all(time is not None for time in sweep.times)
    assert run("schedules", "list", "--json").json == []


def test_the_times_of_a_sweep_are_relative_to_those_of_the_default(
    run: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def times(problem: Problem, target: Target, *_: Any) -> dict[Schedule, Outcome]:
        default = default_schedule(problem, target)
        schedules = [one for one in SearchSpace.of(problem, target).schedules() if one != default]
        ratios = {schedules[0]: 30.0, default: 1.0, schedules[1]: 2.0}
        return {
            one: Outcome(stage="full", times_ms=(5.0 * ratio,), default_times_ms=(5.0,))
            for one, ratio in ratios.items()
        }

    monkeypatch.setattr("hsa_compile.cli.tuning.record._sweep", times)
    file = tmp_path / "sweep.json"
    assert run("tune", *SHAPE, "--record", str(file)).code == 0
    assert RecordedSweep.load(file).times == [150.0, 5.0, 10.0]


def test_what_the_line_of_a_search_counts_was_timed(run: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    default = default_schedule(Problem(**FIELDS), Target.parse("cpu"))
    prepared: list[Schedule] = []

    def prepare(problem: Problem, schedule: Schedule, *rest: Any) -> bench_module.Candidate:
        prepared.append(schedule)
        if schedule != default and len(prepared) < 4:
            raise WrongResult("o is off")
        return bench_module.Candidate(schedule=schedule, fingerprint="0123456789abcdef", call=lambda: None)

    monkeypatch.setattr(bench_module, "prepare", prepare)
    done = run(*TUNE, "--trials", "8")
    assert "best of 6 timed" in done.err
    assert "failed: 2 WrongResult" in done.err


def test_a_stored_winner_is_timed_again_and_dropped_if_it_loses(run: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*TUNE).code == 0
    (record,) = [record for _, record in default_cache().entries()]
    faster = replace(record, verdict="still the fastest")
    monkeypatch.setattr("hsa_compile.autotune.play_off.verify", lambda record, device: faster)
    done = run("tune", "--verify")
    assert (done.code, done.out.count("kept, ")) == (0, 1)
    assert "1 stored winner timed again" in done.out
    assert [record for _, record in default_cache().entries()] == [faster]

    def busy(record: TuningRecord, device: str) -> TuningRecord:
        raise TimedOut("killed after 20 s")

    monkeypatch.setattr("hsa_compile.autotune.play_off.verify", busy)
    done = run("tune", "--verify")
    assert "kept as it is, killed after 20 s" in done.out
    assert "0 stored winners timed again" in done.out
    assert [record for _, record in default_cache().entries()] == [faster]
    monkeypatch.setattr("hsa_compile.autotune.play_off.verify", lambda record, device: "the default is faster now")
    assert "dropped, the default is faster now" in run("tune", "--verify").out
    assert not list(default_cache().entries())
