"""The last word: the best few against the default, interleaved, and the default unless it is clearly beaten."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hsa_compile.autotune.candidate import Candidate
from hsa_compile.autotune.measure import quantile, summarize
from hsa_compile.schedules.record import Measurement

MIN_GAIN = 0.01  # a winner saves at least this share of the default's time …
CONFIDENT_SHARE = 0.8  # … and is faster in at least this share of the rounds
MIN_ROUNDS = 9  # with fewer, one of four equals would beat the default by luck every fifth time
_ROUNDS_AT_ONCE = 3

TimeAll = Callable[[Sequence[Candidate], int], list[list[float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Who won, and both measurements from the same rounds."""

    winner: Candidate
    measurement: Measurement
    default_measurement: Measurement


def play_off(
    default: Candidate, challengers: Sequence[Candidate], time_all: TimeAll, *, max_rounds: int, deadline: float
) -> Verdict:
    """Times default and challengers in turns and picks the fastest that beats the default by more than the noise.

    A challenger beats the default if its median ratio, round by round, is below `1 − MIN_GAIN` and it was faster
    in at least `CONFIDENT_SHARE` of the rounds.

    Args:
        time_all: interleaved times of several candidates over a number of rounds.
        max_rounds: at most so many; at least `MIN_ROUNDS` are run.
        deadline: `time.monotonic()` after which no more rounds begin than those.
    """
    entrants = [default, *challengers]
    times: list[list[float]] = [[] for _ in entrants]
    while len(times[0]) < max_rounds:
        for collected, new in zip(times, time_all(entrants, _ROUNDS_AT_ONCE), strict=True):
            collected.extend(new)
        if len(times[0]) >= MIN_ROUNDS and time.monotonic() >= deadline:
            break
    ratios = [[t / d for t, d in zip(mine, times[0], strict=True)] for mine in times]
    medians = [quantile(r, 0.5) for r in ratios]
    beaters = [
        i
        for i in range(1, len(entrants))
        if medians[i] < 1 - MIN_GAIN and sum(r < 1 for r in ratios[i]) >= CONFIDENT_SHARE * len(ratios[i])
    ]
    best = min(beaters, key=lambda i: medians[i], default=0)
    return Verdict(winner=entrants[best], measurement=summarize(times[best]), default_measurement=summarize(times[0]))
