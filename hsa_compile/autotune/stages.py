"""One candidate from compile to times, in stages, each dearer than the one before; few of the bad see the last."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from hsa_compile.autotune.bench import FAILURES, Bench
from hsa_compile.autotune.outcome import Outcome
from hsa_compile.autotune.resources import Resources
from hsa_compile.errors import OutOfResources
from hsa_compile.schedules.schedule import Schedule

QUICK_ROUNDS = 3  # where the default does not take long; else two calls around one of the default
MAX_MORE_ROUNDS = 4
CLEARLY_SLOWER = 1.25  # times the best so far: not worth more than the quick timings, nor a place in the play-off
FAR_SLOWER = 3.0  # times the best so far: not worth more than one call, where the default takes long

_LONG_MS = 10.0  # a default that takes longer shows in one call whether a candidate is far slower
_MS_A_ROUND = 100.0  # that a further round may take; of slower candidates there are fewer


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """The default, as candidates are compared with it: ready on the bench.

    Attributes:
        schedule: what all are timed in turns with.
        outcome: of the default against itself.
    """

    schedule: Schedule
    outcome: Outcome

    @property
    def median_ms(self) -> float:
        """The default's time."""
        assert self.outcome.median_ms is not None
        return self.outcome.median_ms


def measure_default(
    schedule: Schedule, bench: Bench, *, compiled: Callable[[], Resources | None] | None = None
) -> Baseline:
    """Prepares the default and times it.

    Args:
        compiled: as for `evaluate`.

    Raises:
        HSACompileError: it fails; without it there is nothing to compare with.
    """
    start = time.monotonic()
    resources = compiled() if compiled else bench.compile(schedule)
    fingerprint = bench.prepare(schedule)
    first, second = bench.time([schedule, schedule], QUICK_ROUNDS)
    times = (*first, *second)
    outcome = Outcome(
        stage="full",
        times_ms=times,
        default_times_ms=times,
        fingerprint=fingerprint,
        resources=resources,
        seconds=time.monotonic() - start,
    )
    return Baseline(schedule=schedule, outcome=outcome)


def evaluate(
    schedule: Schedule,
    bench: Bench,
    baseline: Baseline,
    *,
    best_ratio: float,
    compiled: Callable[[], Resources | None] | None = None,
    more_rounds: int = MAX_MORE_ROUNDS,
) -> Outcome:
    """What becomes of one candidate.

    Args:
        best_ratio: of those timed so far; whoever is `CLEARLY_SLOWER` than that gets the quick timings only, and
            whoever is `FAR_SLOWER` one call only, if the default takes long enough for one to tell.
        compiled: waits for what the candidate uses, if it is compiled elsewhere; by default the bench compiles it.
        more_rounds: at most, after the quick timings.
    """
    start = time.monotonic()
    stage, resources = "resources", None
    try:
        resources = compiled() if compiled else bench.compile(schedule)
        if resources and (reason := resources.why_hopeless(baseline.outcome.resources or Resources())):
            raise OutOfResources(reason)
        stage = "prepare"
        fingerprint = bench.prepare(schedule)
        stage = "quick"
        pair = [schedule, baseline.schedule]
        is_long = baseline.median_ms >= _LONG_MS
        times, default_times = bench.time(pair, 1 if is_long else QUICK_ROUNDS)
        if is_long and times[0] <= FAR_SLOWER * best_ratio * default_times[0]:
            # Before and after the default: both are compared with its one call, which drift takes from neither.
            (again,) = bench.time([schedule], 1)
            times, default_times = [*times, *again], default_times * 2
        outcome = _timed(stage, times, default_times, fingerprint, resources, start)
        assert outcome.ratio is not None
        more = min(more_rounds, int(more_rounds * _MS_A_ROUND / (2 * baseline.median_ms)))
        if outcome.ratio > CLEARLY_SLOWER * best_ratio or more < 1:
            return outcome
        stage = "full"
        more_times, more_default_times = bench.time(pair, more)
        return _timed(
            stage, [*times, *more_times], [*default_times, *more_default_times], fingerprint, resources, start
        )
    except FAILURES as error:
        return Outcome.failed(stage, error, resources, time.monotonic() - start)


def _timed(
    stage: str,
    times: list[float],
    default_times: list[float],
    fingerprint: str,
    resources: Resources | None,
    start: float,
) -> Outcome:
    return Outcome(
        stage=stage,
        times_ms=tuple(times),
        default_times_ms=tuple(default_times),
        fingerprint=fingerprint,
        resources=resources,
        seconds=time.monotonic() - start,
    )
