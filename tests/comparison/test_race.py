"""Contenders that are right are timed in turns; the others get no time."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hsa_compile.autotune.bench import bench as measure_module
from hsa_compile.comparison import DECODE, FORWARD, KINDS
from hsa_compile.comparison import race as module
from hsa_compile.comparison.contender import DENSE, SAME, Case, Contender
from hsa_compile.comparison.peaks import Peaks
from hsa_compile.comparison.race import MAX_ROUNDS, MIN_ROUNDS, MOST_ROUNDS, Race, _num_rounds
from hsa_compile.comparison.result import FAILED, LEFT_OUT, TIMED, WRONG
from hsa_compile.errors import InvalidArgument, WrongResult
from hsa_compile.problem import Problem

CPU = torch.device("cpu")
PEAKS = {"float32": Peaks(tflops=1e3, gb_s=1e3, source="a guess")}


class FakeClock:
    """Stands in for the `time` module: calls of contenders take what they say, and nothing else takes any time."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    for one in (module, measure_module, sys.modules[__name__]):
        monkeypatch.setattr(one, "time", clock)
    return clock


def fake(name: str, milliseconds: float = 1.0, check: Any = None, **fields: Any) -> Contender:
    def call() -> tuple[torch.Tensor, ...]:
        time.sleep(milliseconds / 1e3)
        return ()

    return Contender(
        name=name, computes=SAME, make=lambda case: call, check=check or (lambda case, call: None), **fields
    )


def raising(error: BaseException) -> Callable[..., Any]:
    def check(case: Case, call: Any) -> None:
        raise error

    return check


def test_ratios_are_to_ours_and_only_what_is_right_has_a_time(problem_of: Callable[..., Problem]) -> None:
    contenders = [
        fake("ours", 2.0),
        fake("slow", 8.0),
        fake("wrong", check=raising(WrongResult("o is off by 1"))),
        fake("broken", check=raising(KeyError("q"))),
        fake("greedy", check=raising(torch.OutOfMemoryError("no memory"))),
        replace(fake("picky", check=raising(RuntimeError("No available kernel"))), computes=DENSE),
        fake("absent", why_not=lambda case: "not installed"),
        fake("elsewhere", kinds=(DECODE,)),
    ]
    race = Race(contenders, CPU, PEAKS, seconds=10)
    (results,) = race.run([(FORWARD, problem_of(FORWARD))])
    by_name = {result.contender: result for result in results}
    assert {name: result.status for name, result in by_name.items()} == {
        "ours": TIMED, "slow": TIMED, "wrong": WRONG, "broken": FAILED, "greedy": LEFT_OUT, "picky": LEFT_OUT,
        "absent": LEFT_OUT,
    }  # fmt: skip
    assert by_name["ours"].ratio == (1, 1, 1)
    assert by_name["slow"].ratio is not None
    assert by_name["slow"].ratio == pytest.approx((4, 4, 4))
    assert by_name["wrong"].measurement is by_name["broken"].measurement is None
    assert by_name["wrong"].note == "o is off by 1"
    assert by_name["picky"].note == "RuntimeError: No available kernel"
    assert by_name["broken"].note == "KeyError: 'q'"
    assert [result.contender for result in results if result.bad] == ["wrong", "broken"]


def test_an_error_without_a_name_here_ends_the_run(problem_of: Callable[..., Problem]) -> None:
    race = Race([fake("ours", check=raising(KeyboardInterrupt()))], CPU, PEAKS, seconds=10)
    with pytest.raises(KeyboardInterrupt):
        list(race.run([(FORWARD, problem_of(FORWARD))]))


def test_a_contender_that_the_budget_has_no_time_for_is_left_out_and_ours_is_not(
    problem_of: Callable[..., Problem],
) -> None:
    slow = fake("slow", 270.0)
    race = Race([fake("ours"), slow], CPU, PEAKS, seconds=0.1)
    found = list(race.run([(FORWARD, problem_of(FORWARD)), (FORWARD, problem_of(FORWARD, 407))]))
    first, second = ({result.contender: result for result in results} for results in found)
    assert first["slow"].status == TIMED  # nothing was known of its pace
    assert first["slow"].measurement.repeats == MIN_ROUNDS
    assert second["slow"].status == LEFT_OUT
    assert "--seconds" in second["slow"].note
    assert second["ours"].status == TIMED


def test_what_grows_faster_than_its_work_is_foreseen_by_its_effort(problem_of: Callable[..., Problem]) -> None:
    slow = fake("slow", 200.0, effort=lambda case: float(case.problem.seq_len) ** 20)
    race = Race([fake("ours"), slow], CPU, PEAKS, seconds=2)
    found = list(race.run([(FORWARD, problem_of(FORWARD, length)) for length in (203, 407)]))
    assert [results[1].status for results in found] == [TIMED, LEFT_OUT]


def test_quick_calls_have_more_rounds_and_slow_ones_few() -> None:
    assert _num_rounds(1e-4, 60) == _num_rounds(1e-4, 0) == MOST_ROUNDS
    assert _num_rounds(0.5, 60) == MAX_ROUNDS
    assert _num_rounds(10, 60) == 6
    assert _num_rounds(10, 0) == MIN_ROUNDS


def test_short_and_cheap_cases_come_first(problem_of: Callable[..., Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_QUICK_S", 0.0)
    told: list[str] = []
    race = Race([fake("ours", 0.1)], CPU, {}, seconds=0.01)
    entries = [(kind, problem_of(kind, length)) for length in (208, 96) for kind in KINDS]
    order = [results[0] for results in race.run(entries, on_progress=told.append)]
    assert [(result.problem.kv_len, result.kind) for result in order] == [
        (length, kind) for length in (96, 208) for kind in ("decode", "select", "forward", "both")
    ]
    assert told[0] == "decode 96: ours"


def test_a_claim_or_kind_that_there_is_not_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="computes = 'magic' is not one of same function, dense"):
        Contender(name="x", computes="magic", make=lambda case: tuple, check=lambda case, call: None)
    with pytest.raises(InvalidArgument, match="kind = 'prefill' is not one of"):
        fake("x", kinds=("prefill",))
