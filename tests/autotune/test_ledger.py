"""Timings that outlive their search: found again by what they are of, and whatever else is in the file."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_benches import fake_time

from hsa_compile.autotune.cost.roofline import Resources
from hsa_compile.autotune.evaluate import Outcome
from hsa_compile.autotune.study.ledger import Ledger, ProblemLedger
from hsa_compile.autotune.tune import tune
from hsa_compile.errors import (
    CandidateCrashed,
    CompilerCrashed,
    CompileTimedOut,
    HSACompileError,
    OutOfMemory,
    StorageError,
    TimedOut,
    WrongResult,
)
from hsa_compile.problem import Problem
from hsa_compile.schedules import ops as ops_module
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace, default_schedule
from hsa_compile.target import Target

PROBLEM = Problem(seq_len=131072, num_heads=4, num_kv_heads=1, head_dim=64, top_k=8)
TIMED = Outcome(
    stage="full",
    times_ms=(1.0, 2.0, 3.0),
    default_times_ms=(2.0, 4.0, 6.0),
    fingerprint="0123456789abcdef",
    resources=Resources(spills=4, registers=96, shared_memory=1024, occupancy=0.25),
    seconds=1.5,
)
KEY: Mapping[str, Any] = {"schedule": {"dataflow": "token", "block_tokens": 4}, "fingerprint": "0123456789abcdef"}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "studies" / "ledger.jsonl")


def of_problem(ledger: Ledger, problem: Problem = PROBLEM, inputs: str = "random") -> ProblemLedger:
    target = Target.parse("cpu")
    return ProblemLedger(ledger, problem, target, inputs, default_schedule(problem, target))


def some_schedules() -> list[Schedule]:
    return list(SearchSpace.of(PROBLEM, Target.parse("cpu")).schedules())


def test_lines_come_back_as_they_went_in_oldest_first(ledger: Ledger) -> None:
    assert list(ledger.lines()) == []
    failed = Outcome.failed("prepare", WrongResult("o is off"))
    ledger.add(KEY, TIMED)
    ledger.add(KEY, failed)
    assert list(ledger.lines()) == [(KEY, TIMED), (KEY, failed)]


def test_a_torn_last_line_is_passed_over_and_the_next_is_whole(ledger: Ledger) -> None:
    ledger.add(KEY, TIMED)
    ledger.add(KEY, TIMED)
    whole = ledger.path.read_bytes()
    for cut in (1, 2, 40, len(whole) // 2 - 1):
        ledger.path.write_bytes(whole[:-cut])
        assert len(list(ledger.lines())) == 1
        ledger.add(KEY, TIMED)
        assert len(list(ledger.lines())) == 2


@pytest.mark.parametrize(
    "garbage", [b"\n", b"null\n", b"[]\n", b"{}\n", b'{"checksum": 0}\n', b"\xff\xfe\n", b"{" * 5000]
)
def test_what_is_no_line_of_a_ledger_is_passed_over(ledger: Ledger, garbage: bytes) -> None:
    ledger.add(KEY, TIMED)
    ledger.path.write_bytes(garbage + ledger.path.read_bytes())
    assert len(list(ledger.lines())) == (1 if garbage.endswith(b"\n") else 0)


def test_a_changed_number_does_not_count(ledger: Ledger) -> None:
    ledger.add(KEY, TIMED)
    ledger.path.write_text(ledger.path.read_text().replace("6.0", "9.0"))
    assert list(ledger.lines()) == []


def test_a_ledger_that_cannot_be_written_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"ledger .* cannot be written"):
        Ledger(tmp_path / "file" / "ledger.jsonl").add(KEY, TIMED)


def test_the_latest_outcome_of_each_schedule_is_known(ledger: Ledger) -> None:
    one, other, *_ = some_schedules()
    of_problem(ledger).add(one, TIMED)
    of_problem(ledger).add(other, TIMED)
    later = replace(TIMED, times_ms=(2.0, 4.0, 6.0))
    of_problem(ledger).add(one, later)
    assert of_problem(ledger).known() == {one: later, other: TIMED}
    assert later.ratio == 1.0
    assert TIMED.ratio == 0.5


def test_another_problem_input_default_or_version_is_another_timing(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = some_schedules()[0]
    of_problem(ledger).add(schedule, TIMED)
    assert of_problem(ledger, replace(PROBLEM, top_k=4)).known() == {}
    assert of_problem(ledger, inputs="local").known() == {}
    target = Target.parse("cpu")
    other_default = next(s for s in some_schedules() if s != default_schedule(PROBLEM, target))
    assert ProblemLedger(ledger, PROBLEM, target, "random", other_default).known() == {}
    monkeypatch.setattr("hsa_compile.autotune.study.ledger.installed_versions", lambda: {"torch": "0.1"})
    assert of_problem(ledger).known() == {}


def test_a_timing_of_another_source_is_not_known(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    view, schedule = of_problem(ledger), some_schedules()[0]
    with monkeypatch.context() as patch:
        emitted = SimpleNamespace(fingerprint="0123456789abcdef")
        patch.setattr("hsa_compile.autotune.study.ledger.emit", lambda *_: emitted)
        view.add(schedule, TIMED)
    assert view.known() == {}
    view.add(schedule, TIMED)
    assert view.known() == {schedule: TIMED}


@pytest.mark.parametrize("passing", [CandidateCrashed, CompilerCrashed, CompileTimedOut, OutOfMemory, TimedOut])
def test_a_failure_that_another_day_may_not_repeat_is_not_known(passing: type[HSACompileError], ledger: Ledger) -> None:
    crashed, timed, wrong, *_ = some_schedules()
    view = of_problem(ledger)
    view.add(timed, TIMED)
    for schedule in (crashed, timed):
        view.add(schedule, Outcome.failed("prepare", passing("SIGSEGV, or killed after 20 s")))
    view.add(wrong, Outcome.failed("prepare", WrongResult("o is off")))
    assert view.known() == {timed: TIMED, wrong: Outcome.failed("prepare", WrongResult("o is off"))}


def test_a_new_value_of_a_knob_times_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("FAKE_BENCH_LOG", str(log))
    options: dict[str, Any] = {
        "device": "cpu",
        "trials": 1000,
        "timeout": 600.0,
        "sampler": "random",
        "isolate": False,
        "bench": "fake_benches:open_fake",
        "storage": str(tmp_path / "study.journal"),
        "ledger": tmp_path / "ledger.jsonl",
    }
    kind = ("hsa_forward", "torch")
    own = ops_module.OP_BACKENDS[kind]
    whole = own.choices
    small = {"chunk": {**whole["chunk"], "tile_rows": (1024, 2048, 4096)}, "token": whole["token"]}
    monkeypatch.setitem(ops_module.OP_BACKENDS, kind, replace(own, choices=small))
    before = set(some_schedules())
    assert tune(PROBLEM, **options).trials == len(before)
    assert len(log.read_text().splitlines()) == len(before)
    log.unlink()

    larger = {"chunk": {**whole["chunk"], "tile_rows": (512, 1024, 2048, 4096)}, "token": whole["token"]}
    monkeypatch.setitem(ops_module.OP_BACKENDS, kind, replace(own, choices=larger))
    new = set(some_schedules()) - before
    assert new
    record = tune(PROBLEM, **options)
    default = default_schedule(PROBLEM, Target.parse("cpu"))
    assert set(map(Schedule.parse, log.read_text().splitlines())) == new | {default}
    assert record.trials == len(before | new)
    assert record.schedule == min(before | new, key=lambda schedule: fake_time(schedule, default))
    assert len(list(Ledger(tmp_path / "ledger.jsonl").lines())) == len(before | new)
