import random
from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from hsa_compile.autotune import play_off as play_off_module
from hsa_compile.autotune.bench.bench import FAILURES
from hsa_compile.autotune.play_off import MIN_ROUNDS, Verdict, play_off
from hsa_compile.errors import CandidateCrashed, HSACompileError, TimedOut
from hsa_compile.schedules.schedule import Schedule

ROUNDS = 15
DRIFT, NOISE = 0.5, 0.04


def noisy(speeds: Sequence[float], seed: int, noise: float = NOISE) -> Callable[[Sequence[Schedule], int], Any]:
    """Times around `speeds` ms: each with noise of its own, and all with the slow drift of a shared machine."""
    generator = random.Random(seed)

    def time_all(candidates: Sequence[Schedule], rounds: int) -> list[list[float]]:
        assert len(candidates) == len(speeds)
        drifts = [1 + DRIFT * generator.random() for _ in range(rounds)]
        return [[speed * drift * generator.lognormvariate(0, noise) for drift in drifts] for speed in speeds]

    return time_all


def decide(speeds: Sequence[float], seed: int = 0, noise: float = NOISE) -> tuple[int, Verdict]:
    """The index in `speeds` of the winner (0 is the default) and the verdict."""
    entrants = [Schedule.of("token", block_tokens=i) for i in range(len(speeds))]
    verdict = play_off(entrants[0], entrants[1:], noisy(speeds, seed, noise), max_rounds=ROUNDS, deadline=float("inf"))
    return entrants.index(verdict.winner), verdict


def test_without_challengers_the_default_wins() -> None:
    winner, verdict = decide([1.0])
    assert winner == 0
    assert verdict.measurement == verdict.default_measurement
    assert verdict.measurement.repeats == ROUNDS


def test_the_default_stays_against_slower_ones() -> None:
    assert {decide([1.0, 1.1, 1.3], seed)[0] for seed in range(50)} == {0}


def test_the_default_stays_against_a_gain_too_small_to_matter_however_certain() -> None:
    assert decide([1.0, 0.995], noise=0)[0] == 0


def test_the_default_mostly_stays_against_equals_under_noise() -> None:
    changed = sum(decide([1.0] * 5, seed)[0] != 0 for seed in range(100))
    assert changed <= 15


def test_a_median_gain_that_most_rounds_do_not_confirm_is_noise() -> None:
    def time_all(candidates: Sequence[Schedule], rounds: int) -> list[list[float]]:
        return [[1.0, 1.0, 1.0], [0.9, 0.9, 1.2]]  # faster by a tenth at the median, in two rounds of three

    default, other = (Schedule.of("token", block_tokens=i) for i in (0, 1))
    verdict = play_off(default, [other], time_all, max_rounds=ROUNDS, deadline=float("inf"))
    assert verdict.winner is default


def test_the_fastest_that_beats_the_default_wins_under_noise_and_drift() -> None:
    winners = [decide([1.0, 0.85, 0.7, 1.2], seed)[0] for seed in range(50)]
    assert winners == [2] * 50


def test_a_tie_that_does_not_clearly_beat_the_default_is_told_but_not_picked() -> None:
    def time_all(candidates: Sequence[Schedule], rounds: int) -> list[list[float]]:
        # The second is the fastest at the median, but slower than the default in a third of the rounds.
        return [[1.0] * 3, [0.965, 0.965, 1.2], [0.97] * 3]

    default, unclear, clear = (Schedule.of("token", block_tokens=i) for i in range(3))
    verdict = play_off(default, [unclear, clear], time_all, max_rounds=12, deadline=float("inf"))
    assert verdict.tie_set == (clear, unclear)


def test_both_measurements_come_from_the_same_rounds() -> None:
    winner, verdict = decide([2.0, 1.0], noise=0)
    assert winner == 1
    assert verdict.measurement.repeats == verdict.default_measurement.repeats == ROUNDS
    assert verdict.default_measurement.median_ms == pytest.approx(2 * verdict.measurement.median_ms)
    assert verdict.measurement.p20_ms <= verdict.measurement.median_ms <= verdict.measurement.p80_ms


def test_no_round_begins_after_the_deadline_but_those_that_are_needed(
    clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(play_off_module, "time", SimpleNamespace(monotonic=clock.monotonic))
    default, other = (Schedule.of("token", block_tokens=i) for i in (0, 1))

    def time_all(candidates: Sequence[Schedule], rounds: int) -> list[list[float]]:
        clock.pass_(1.0 * rounds)
        return [[1.0] * rounds, [0.5] * rounds]

    verdict = play_off(default, [other], time_all, max_rounds=ROUNDS, deadline=clock.now + 11)
    assert verdict.measurement.repeats == 12
    late = play_off(default, [other], time_all, max_rounds=ROUNDS, deadline=clock.now - 1)
    assert late.measurement.repeats == MIN_ROUNDS
    assert late.winner is other


class Failing:
    """Times of 1, 2, 3 … ms backwards: later entrants are faster. Each of some fails from one of its calls on."""

    def __init__(self, failing: dict[Schedule, tuple[int, HSACompileError]]) -> None:
        self.failing = failing
        self.calls: Counter[Schedule] = Counter()

    def time_all(self, candidates: Sequence[Schedule], rounds: int) -> list[list[float]]:
        for schedule in candidates:
            self.calls[schedule] += 1
            begin, error = self.failing.get(schedule, (len(ENTRANTS) * ROUNDS, None))
            if error is not None and self.calls[schedule] > begin:
                raise error
        return [[10.0 - schedule.number("block_tokens")] * rounds for schedule in candidates]


ENTRANTS = [Schedule.of("token", block_tokens=i) for i in range(4)]


@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("begin", range(6))
def test_a_challenger_that_fails_in_any_round_is_dropped_by_name_and_the_best_of_the_others_wins(
    kind: type[HSACompileError], begin: int
) -> None:
    bench = Failing({ENTRANTS[3]: (begin, kind("killed after 20 s")), ENTRANTS[1]: (begin, kind("no room"))})
    verdict = play_off(ENTRANTS[0], ENTRANTS[1:], bench.time_all, max_rounds=ROUNDS, deadline=float("inf"))
    never_failed = begin >= ROUNDS // 3
    assert verdict.winner == ENTRANTS[3 if never_failed else 2]
    assert verdict.measurement.repeats == verdict.default_measurement.repeats == ROUNDS
    name = kind.__name__
    assert never_failed or verdict.text.endswith(
        "beats the default at 95% confidence in 15 rounds; dropped from the play-off: "
        f"{ENTRANTS[1]} ({name}: no room), {ENTRANTS[3]} ({name}: killed after 20 s)"
    )


def test_what_a_challenger_failed_with_is_told_in_a_few_words() -> None:
    errors = {schedule: (0, CandidateCrashed("no room:\n" + "x" * 5000)) for schedule in ENTRANTS[1:]}
    verdict = play_off(ENTRANTS[0], ENTRANTS[1:], Failing(errors).time_all, max_rounds=ROUNDS, deadline=float("inf"))
    assert "(CandidateCrashed: no room: xxx" in verdict.text
    assert verdict.text.isprintable()
    assert len(verdict.text) < 600


def test_a_play_off_that_is_told_to_stop_ends_with_the_rounds_that_are_needed() -> None:
    verdict = play_off(
        ENTRANTS[0],
        ENTRANTS[1:],
        Failing({}).time_all,
        max_rounds=ROUNDS,
        deadline=float("inf"),
        should_stop=lambda: True,
    )
    assert verdict.measurement.repeats == MIN_ROUNDS
    assert verdict.winner == ENTRANTS[3]


def test_the_default_stays_where_all_challengers_fail() -> None:
    errors = {schedule: (0, CandidateCrashed("it died")) for schedule in ENTRANTS[1:]}
    verdict = play_off(ENTRANTS[0], ENTRANTS[1:], Failing(errors).time_all, max_rounds=ROUNDS, deadline=float("inf"))
    assert verdict.winner == ENTRANTS[0]
    assert verdict.text.startswith("the default stays: nothing else came near it; dropped from the play-off: ")


def test_a_default_that_fails_once_is_timed_again_and_nobody_is_dropped() -> None:
    failed: list[int] = []

    def time_all(candidates: Sequence[Schedule], rounds: int) -> list[list[float]]:
        if not failed:
            failed.append(rounds)
            raise TimedOut("killed after 20 s")
        return Failing({}).time_all(candidates, rounds)

    verdict = play_off(ENTRANTS[0], ENTRANTS[1:], time_all, max_rounds=ROUNDS, deadline=float("inf"))
    assert verdict.winner == ENTRANTS[3]
    assert "dropped" not in verdict.text


@pytest.mark.parametrize("kind", FAILURES)
def test_a_default_that_cannot_be_timed_any_more_is_named_with_what_to_raise(kind: type[HSACompileError]) -> None:
    bench = Failing({ENTRANTS[0]: (1, kind("killed after 600 s"))})
    with pytest.raises(kind) as raised:
        play_off(ENTRANTS[0], ENTRANTS[1:], bench.time_all, max_rounds=ROUNDS, deadline=float("inf"))
    text = f"the default schedule, {ENTRANTS[0]}, failed, and without it nothing can be compared: killed after 600 s"
    assert str(raised.value).startswith(text)
    assert ("`first_s` of `TuneOptions.limits` allows more" in str(raised.value)) == issubclass(kind, TimedOut)
