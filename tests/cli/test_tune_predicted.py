"""`hsa-compile tune --target` in processes of its own, since this one interprets Triton kernels."""

import json
import os
import re
import subprocess
import sys

import pytest
from shell import Shell

from hsa_compile.paths import schedule_dir
from hsa_compile.problem import OPS, Problem
from hsa_compile.schedules.cache import ScheduleCache
from hsa_compile.schedules.record import PREDICTED, Measurement, TuningRecord
from hsa_compile.schedules.space import SearchSpace, default_schedule
from hsa_compile.target import Target

pytest.importorskip("triton")
SHAPE = ["--head-dim", "64", "--heads", "8", "--kv-heads", "2", "--chunk-size", "32", "--seq-len", "2k", "--top-k", "4"]


def hsa_compile(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hsa_compile", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.exhaustive
def test_a_gpu_that_is_not_here_gets_predicted_entries_that_are_valid_and_cached() -> None:
    tune = ["tune", "--op", "attention", "--target", "sm_90", "--timeout", "5", *SHAPE]
    done = hsa_compile(*tune)
    assert done.returncode == 0, done.stderr
    assert "times are a model's" in done.stdout
    listed = [entry for entry in json.loads(hsa_compile("schedules", "list", "--json").stdout)
              if entry["origin"] == "user"]  # fmt: skip
    assert [(entry["kind"], entry["target"]["arch"]) for entry in listed] == [("predicted", "sm_90")] * 2
    for entry in listed:
        assert entry["measurement"]["repeats"] == 0
        assert entry["speedup"] >= 1.0
    again = hsa_compile(*tune)
    assert again.stdout.count("cached (--force predicts again)") == 2
    target = Target.parse("sm_90")
    for _, record in ScheduleCache(schedule_dir()).entries():
        assert SearchSpace.of(record.problem, target).is_valid(record.schedule)


def test_a_prediction_is_stored_shown_and_cached(run: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def predict(problem: Problem, target: Target, **_: object) -> TuningRecord:
        asked.append(problem.op)
        schedule = default_schedule(problem, target)
        ms = Measurement.predicted(2.0)
        return TuningRecord(
            problem=problem, target=target, schedule=schedule, measurement=ms, default_measurement=ms, trials=3,
            failures={}, inputs="none", fingerprint="0" * 16, versions={}, date="2026-02-03T04:05:06+00:00",
            kind=PREDICTED,
        )  # fmt: skip

    monkeypatch.setattr("hsa_compile.cli.tuning.predicted.predict_schedule", predict)
    done = run("tune", "--target", "sm_90", "--op", "attention", *SHAPE)
    assert done.code == 0, done.err
    assert len(re.findall(r"predicted +2 ms", done.out)) == 2
    listed = run("schedules", "list", "--json").json
    assert [(entry["kind"], entry["target"]["arch"]) for entry in listed] == [("predicted", "sm_90")] * 2
    assert (
        run("tune", "--target", "sm_90", "--op", "attention", *SHAPE).out.count("cached (--force predicts again)") == 2
    )
    assert asked == list(OPS)
    run("tune", "--target", "sm_90", "--op", "attention", "--force", *SHAPE)
    assert asked == 2 * list(OPS)


def test_what_has_no_model_is_refused_before_anything_is_tuned(run: Shell) -> None:
    outcome = run("tune", "--device", "cpu", "--report-prediction", *SHAPE)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == "error: there is no model of CPUs: only the times of GPU kernels can be predicted\n"


@pytest.mark.parametrize("name", ["banana", "cpu", "cuda:0"])
def test_a_target_that_is_not_known_is_refused_with_all_that_are(name: str, run: Shell) -> None:
    outcome = run("tune", "--target", name)
    assert (outcome.code, outcome.out) == (2, "")
    for word in (repr(name), "'sm_90'", "'h100'", "'mi300x'"):
        assert word in outcome.err


def test_a_shape_that_no_schedule_can_run_is_refused(run: Shell) -> None:
    outcome = run("tune", "--target", "h100", "--dtype", "fp64", "--op", "forward")
    assert (outcome.code, outcome.out) == (2, "")
    assert "use the CPU" in outcome.err
