"""Schedules that were timed under another compiler: they are marked, and can be timed again."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from hsa_compile.autotune import play_off as play_off_module
from hsa_compile.autotune.play_off import verify
from hsa_compile.errors import (
    CandidateCrashed,
    CompileError,
    CompilerCrashed,
    HSACompileError,
    OutOfMemory,
    TimedOut,
)
from hsa_compile.schedules.cache import ScheduleCache
from hsa_compile.schedules.explain import explain
from hsa_compile.schedules.record import TuningRecord
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import Target
from hsa_compile.versions import installed_versions

MakeRecord = Callable[..., TuningRecord]
NOW = {"torch": "2.13.0", "triton": "3.7.1", "driver": "580.95"}


def test_another_minor_version_of_pytorch_or_triton_or_major_of_the_driver_is_another_compiler(
    make_record: MakeRecord, gpu: Target
) -> None:
    assert make_record(torch="2.13.7").outdated(NOW) == ""
    assert make_record(torch="2.1.3").outdated(NOW) == "torch 2.1.3"  # C++ and PyTorch know no Triton
    assert make_record(target=gpu).outdated(NOW) == "triton 3.6.0"
    assert make_record(target=gpu, torch="2.11.0").outdated(NOW) == "torch 2.11.0, triton 3.6.0"
    assert make_record(target=gpu).outdated({"torch": "2.13.1", "triton": "3.6.4"}) == ""


def test_what_is_expected_of_an_entry_says_under_what_it_was_timed(
    make_record: MakeRecord, open_cache: Callable[..., ScheduleCache]
) -> None:
    cache, record = open_cache(), make_record(torch="2.1.3")
    cache.put(record)
    loss = explain(cache, record.problem, record.target).loss
    assert loss == "not known: it was timed under torch 2.1.3; hsa-compile tune --verify times it again"
    cache.put(replace(record, trials=2))
    loss = explain(cache, record.problem, record.target).loss
    assert loss.startswith("not known: only 1 of ")
    assert loss.endswith(", and it was timed under torch 2.1.3; hsa-compile tune --verify times it again")


def test_a_removed_entry_serves_no_more(make_record: MakeRecord, open_cache: Callable[..., ScheduleCache]) -> None:
    cache, record, other = open_cache(), make_record(), make_record(seq_len=64)
    cache.put(record)
    cache.put(other)
    cache.remove(record)
    for one in (cache, open_cache()):
        assert [entry for _, entry in one.entries()] == [other]
    cache.remove(record)  # nothing is left to remove


TOKEN_4 = Schedule.of("token", block_tokens=4)


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch, make_record: MakeRecord) -> Callable[..., TuningRecord | str]:
    """Verifies a record whose schedule and default take so many milliseconds today, or that fails with an error."""

    def verify_with(
        winner_ms: float,
        default_ms: float,
        *,
        error: HSACompileError | None = None,
        in_check: bool = True,
        schedule: Schedule | None = TOKEN_4,
    ) -> TuningRecord | str:
        record = make_record(schedule=schedule, torch="2.6.0")

        class Bench:
            def __enter__(self) -> "Bench":
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def prepare(self, schedule: Schedule) -> None:
                if schedule == record.schedule and error and in_check:
                    raise error

            def time(self, schedules: Sequence[Schedule], rounds: int) -> list[list[float]]:
                if record.schedule in schedules and error:
                    raise error
                return [[winner_ms if schedule == record.schedule else default_ms] * rounds for schedule in schedules]

        monkeypatch.setattr(play_off_module, "IsolatedBench", lambda *_, **__: Bench())
        return verify(record, "cpu")

    return verify_with


def test_a_stored_winner_that_still_wins_gets_the_times_and_versions_of_today(
    stored: Callable[..., TuningRecord | str],
) -> None:
    found = stored(2.0, 3.0)
    assert isinstance(found, TuningRecord)
    assert found.speedup == pytest.approx(1.5)
    assert found.versions == installed_versions()
    assert not found.outdated(installed_versions())


def test_a_stored_winner_that_is_as_fast_as_the_default_stays(stored: Callable[..., TuningRecord | str]) -> None:
    assert isinstance(stored(2.0, 2.0), TuningRecord)


def test_a_stored_winner_that_is_the_default_has_the_times_of_the_default(
    stored: Callable[..., TuningRecord | str],
) -> None:
    found = stored(2.0, 3.0, schedule=None)
    assert isinstance(found, TuningRecord)
    assert (found.is_default, found.speedup) == (True, 1.0)


@pytest.mark.parametrize("in_check", [True, False])
def test_a_stored_winner_that_the_default_beats_or_that_does_not_run_is_none_any_more_and_says_why(
    in_check: bool, stored: Callable[..., TuningRecord | str]
) -> None:
    assert stored(3.0, 2.0) == "the default is faster now"
    error = CompileError("the template\nhas changed " + "x" * 500)
    found = str(stored(2.0, 3.0, error=error, in_check=in_check))
    assert found.startswith("it does not run any more: the template has changed xxx")
    assert len(found) < 200
    found = str(stored(2.0, 3.0, schedule=Schedule.of("token", block_tokens=5)))
    assert found.startswith("it does not run any more: block_tokens = 5 is not one of")


@pytest.mark.parametrize("in_check", [True, False])
@pytest.mark.parametrize("kind", [TimedOut, CandidateCrashed, OutOfMemory, CompilerCrashed])
def test_a_stored_winner_that_fails_for_a_reason_that_may_pass_is_not_judged(
    kind: type[HSACompileError], in_check: bool, stored: Callable[..., TuningRecord | str]
) -> None:
    with pytest.raises(kind, match="killed after 20 s"):
        stored(2.0, 3.0, error=kind("killed after 20 s"), in_check=in_check)
