"""The play-off: the best few are timed in turns with the default, which stays unless one of them clearly beats it.

Schedules that cannot be told from the best are in a tie-set with it; which of these is picked does not depend on the
clock. A stored winner can be put to the same test again, where the compiler has changed since (`verify`).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone

from hsa_compile.autotune.bench.bench import FAILURES, Bench, summarize
from hsa_compile.autotune.bench.device import device_lock
from hsa_compile.autotune.bench.isolation import IsolatedBench
from hsa_compile.autotune.cost.roofline import Resources
from hsa_compile.autotune.evaluate import Times, failure_of_default, median_ratio, time_on_all, together
from hsa_compile.autotune.options import OPEN_BENCH, default_inputs, input_names
from hsa_compile.checks import one_line
from hsa_compile.errors import PASSING, HSACompileError
from hsa_compile.problem import DISTRIBUTIONS
from hsa_compile.schedules.record import Measurement, TuningRecord
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace, default_schedule
from hsa_compile.versions import installed_versions

CONFIDENCE = 0.95
MIN_GAIN = 0.01  # a smaller share of the default's time counts as no gain and no difference, however certain it is
MIN_ROUNDS = 9  # with eight challengers, all of nine rounds must be won to be that confident
_ROUNDS_AT_ONCE = 3
_LONGEST_REASON = 100  # characters of what a verdict says of an error

TimeAll = Callable[[Sequence[Schedule], int], list[list[float]]]
Dropped = Mapping[Schedule, HSACompileError]  # the schedules that failed in a play-off, and why


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The result of a play-off.

    Attributes:
        winner: the schedule that is picked from the tie-set.
        measurement, default_measurement: the winner's and the default's times, from the same rounds.
        tie_set: the best and all that cannot be told from it, in the order of preference; the winner is the first.
        text: what was decided, how sure it is, and which challengers failed on the way.
    """

    winner: Schedule
    measurement: Measurement
    default_measurement: Measurement
    tie_set: tuple[Schedule, ...]
    text: str


def play_off(
    default: Schedule,
    challengers: Sequence[Schedule],
    time_all: TimeAll,
    *,
    max_rounds: int,
    deadline: float,
    should_stop: Callable[[], bool] = lambda: False,
    resources: Callable[[Schedule], Resources | None] = lambda schedule: None,
) -> Verdict:
    """Times default and challengers in turns and picks among the fastest that beat the default by more than noise.

    Two entrants are compared by a sign test on their rounds: it assumes nothing about how noise is distributed. A
    challenger beats the default if it is faster by `MIN_GAIN` at the median and the test says so at `CONFIDENCE`,
    shared out among the challengers, so that the default loses to any of its equals in one search of twenty at most.
    A challenger that fails on the way is out. The fastest of those that beat the default ties with each challenger that
    it does not beat in the same way, and the winner is picked from those of them that beat the default themselves.

    Args:
        default: the default schedule.
        challengers: the others, in the order of the search space or another that does not depend on their times.
        time_all: gives interleaved times of several candidates over a number of rounds.
        max_rounds: the most rounds; at least `MIN_ROUNDS` are run.
        deadline: `time.monotonic()` after which no rounds begin beyond the first `MIN_ROUNDS`.
        should_stop: asked before each of the further rounds.
        resources: gives what a candidate uses, where that is known.

    Raises:
        HSACompileError: the default itself fails.
    """
    times, dropped = _rounds(
        default, challengers, time_all, max_rounds, lambda: time.monotonic() >= deadline or should_stop()
    )
    entrants = [default, *(schedule for schedule in challengers if schedule not in dropped)]
    num_challengers = len(entrants) - 1
    level = (1 - CONFIDENCE) / max(1, num_challengers)
    beaters = [i for i in range(1, len(entrants)) if _is_faster(times[i], times[0], level)]
    best = min(beaters, key=lambda i: median_ratio(times[i], times[0]), default=0)
    may_win = beaters or [0]

    def preference(i: int) -> tuple[int, ...]:
        uses = resources(entrants[i]) or Resources()
        changes = num_changes(entrants[i], default)
        return (i not in may_win, uses.spills, uses.registers, uses.shared_memory, changes, i)

    rivals = range(1 if beaters else 0, len(entrants))
    ties = sorted(
        (i for i in rivals if i == best or not _is_faster(times[best], times[i], 1 - CONFIDENCE)), key=preference
    )
    winner = ties[0]
    return Verdict(
        winner=entrants[winner],
        measurement=summarize(times[winner]),
        default_measurement=summarize(times[0]),
        tie_set=tuple(entrants[i] for i in ties),
        text=_text(winner != 0, num_challengers, len(ties), len(times[0])) + dropped_text(dropped),
    )


class TimesByInputs:
    """Collects what a play-off times on each distribution, and gives it the geometric means.

    Args:
        bench: where candidates are timed.
        inputs: the names of the distributions that the bench has.
    """

    def __init__(self, bench: Bench, inputs: Sequence[str]) -> None:
        self._bench, self._inputs = bench, tuple(inputs)
        self._times: dict[Schedule, Times] = {}

    def time(self, schedules: Sequence[Schedule], rounds: int) -> list[list[float]]:
        """Returns interleaved times of several candidates, as `play_off` asks for them."""
        found = time_on_all(self._bench, schedules, rounds, self._inputs)
        for schedule, times in zip(schedules, found, strict=True):
            known = self._times.setdefault(schedule, {name: [] for name in self._inputs})
            for name, own in times.items():
                known[name] += own
        return [together(times) for times in found]

    def pairs(self, winner: Schedule, default: Schedule) -> dict[str, tuple[Measurement, Measurement]]:
        """Returns the winner's and the default's times on each of several distributions; nothing where there is one."""
        if len(self._inputs) == 1:
            return {}
        own, other = self._times[winner], self._times[default]
        return {name: (summarize(own[name]), summarize(other[name])) for name in self._inputs}


def verify(record: TuningRecord, device: str) -> TuningRecord | str:
    """Times a stored winner in turns with the default once more, on the picks that it was tuned for.

    Where these came from a file, they are those that a search has by default.

    Returns:
        the record with today's times, versions and date; or why the winner is none any more: the default is faster now
        by more than noise, or the winner does not run.

    Raises:
        HSACompileError: the default itself fails, or the winner for a reason that may pass.
    """
    default = default_schedule(record.problem, record.target)
    if why := SearchSpace.of(record.problem, record.target).why_invalid(record.schedule):
        return _runs_no_more(why)
    challengers = [record.schedule] if record.schedule != default else []
    known = all(name in DISTRIBUTIONS for name in input_names(record.inputs))
    distribution = record.inputs if known else default_inputs(record.target.kind)
    arguments = (record.problem, record.target, device, distribution, 0)
    with IsolatedBench(OPEN_BENCH, arguments, lock=device_lock(device)) as bench:
        bench.prepare(default)
        timer = TimesByInputs(bench, input_names(distribution))
        try:
            bench.prepare(record.schedule)
        except FAILURES as error:
            return _runs_no_more(error)
        times, dropped = _rounds(default, challengers, timer.time, MIN_ROUNDS)
    for failure in dropped.values():
        return _runs_no_more(failure)
    if _is_faster(times[0], times[-1], 1 - CONFIDENCE):
        return "the default is faster now"
    return replace(
        record,
        inputs=distribution,
        measurement=summarize(times[-1]),
        default_measurement=summarize(times[0]),
        by_inputs=timer.pairs(record.schedule, default),
        versions=installed_versions(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _runs_no_more(why: HSACompileError | str) -> str:
    """Says that a winner does not run any more; a reason that may pass is raised instead."""
    if isinstance(why, PASSING):
        raise why
    return f"it does not run any more: {one_line(why, _LONGEST_REASON)}"


def num_changes(schedule: Schedule, default: Schedule) -> int:
    """Counts the knobs in which a schedule differs from the default, the dataflow and knobs that one lacks included."""
    return sum(schedule.get(name) != default.get(name) for name in {*schedule, *default})


def dropped_text(dropped: Dropped) -> str:
    """Returns what a verdict says of schedules that failed in the play-off; nothing where none did."""
    if not dropped:
        return ""
    named = ", ".join(
        f"{schedule} ({type(error).__name__}: {one_line(error, _LONGEST_REASON)})"
        for schedule, error in dropped.items()
    )
    return f"; dropped from the play-off: {named}"


def _rounds(
    default: Schedule,
    challengers: Sequence[Schedule],
    time_all: TimeAll,
    max_rounds: int,
    is_late: Callable[[], bool] = lambda: False,
) -> tuple[list[list[float]], Dropped]:
    """Returns the times of the default and of the challengers that did not fail, and those that did.

    All are timed in one call until one fails; from then on each has calls of its own, which tell who does.
    """
    entrants, dropped = [default, *challengers], dict[Schedule, HSACompileError]()
    times: list[list[float]] = [[] for _ in entrants]
    alone = False
    while len(times[0]) < max_rounds:
        try:
            new = _one_round(entrants, time_all, dropped) if alone else time_all(entrants, _ROUNDS_AT_ONCE)
        except FAILURES as error:
            if alone:
                raise failure_of_default(error, default) from error
            alone = True
            continue
        left = [i for i, own in enumerate(new) if own]
        entrants, times = [entrants[i] for i in left], [[*times[i], *new[i]] for i in left]
        if len(times[0]) >= MIN_ROUNDS and is_late():
            break
    return times, dropped


def _one_round(
    entrants: Sequence[Schedule], time_all: TimeAll, dropped: dict[Schedule, HSACompileError]
) -> list[list[float]]:
    """Times the first, which is the default, and each of the others alone.

    Those that fail have no times, and are added to `dropped`.
    """
    default, *others = entrants
    new = time_all([default], 1)
    for schedule in others:
        try:
            new += time_all([schedule], 1)
        except FAILURES as error:
            dropped[schedule] = error
            new.append([])
    return new


def _is_faster(times: Sequence[float], others: Sequence[float], level: float) -> bool:
    """Returns whether `times` beat `others` by more than `MIN_GAIN`, by luck only with a probability of `level`."""
    if median_ratio(times, others) >= 1 - MIN_GAIN:
        return False
    wins = sum(t < o for t, o in zip(times, others, strict=True))
    played = sum(t != o for t, o in zip(times, others, strict=True))
    return sum(math.comb(played, k) for k in range(wins, played + 1)) / 2**played <= level


def _text(beaten: bool, num_challengers: int, num_ties: int, rounds: int) -> str:
    if not num_challengers:
        return "the default stays: nothing else came near it"
    if not beaten:
        return (
            f"the default stays: none of {num_challengers} beats it at {CONFIDENCE:.0%} confidence in {rounds} rounds"
        )
    equals = num_ties - 1
    others = f", {equals} other{'s' if equals > 1 else ''} cannot be told from it" if equals > 0 else ""
    return f"beats the default at {CONFIDENCE:.0%} confidence in {rounds} rounds{others}"
