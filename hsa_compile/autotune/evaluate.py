"""One candidate from compile to times, in stages, each dearer than the one before; few of the bad see the last."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hsa_compile.autotune.bench.bench import FAILURES, Bench
from hsa_compile.autotune.cost.roofline import Resources
from hsa_compile.errors import HSACompileError, InvalidArgument, OutOfResources
from hsa_compile.kernels.measure import quantile
from hsa_compile.schedules.schedule import Schedule

STAGES = ("resources", "prepare", "quick", "full")  # each dearer than the one before


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A candidate that was timed, in turns with the default, or that failed.

    Attributes:
        stage: how far it came: refused for its compiled resources, failed while it was compiled or checked,
            dropped after the quick timings, or timed in full.
        times_ms, default_times_ms: of the same rounds; empty if it failed.
        failure, reason: the name of the error and its message; empty if it was timed.
        fingerprint: of its source; empty if it failed.
        resources: what it uses, where the compiler tells.
        seconds: that it took, compiling ahead not counted.
    """

    stage: str
    times_ms: tuple[float, ...] = ()
    default_times_ms: tuple[float, ...] = ()
    failure: str = ""
    reason: str = ""
    fingerprint: str = ""
    resources: Resources | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise InvalidArgument(f"stage = {self.stage!r} is not one of {', '.join(STAGES)}")
        if bool(self.failure) == bool(self.times_ms) or len(self.times_ms) != len(self.default_times_ms):
            raise InvalidArgument(
                f"an outcome has a failure or pairs of times, not {self.failure!r} with {len(self.times_ms)} times "
                f"and {len(self.default_times_ms)} of the default"
            )
        if not all(math.isfinite(t) and t > 0 for t in (*self.times_ms, *self.default_times_ms)):
            raise InvalidArgument(f"times {[*self.times_ms, *self.default_times_ms]} must be positive milliseconds")

    @property
    def ratio(self) -> float | None:
        """Median of its time over the default's in the same round; None if it failed.

        Ratios to the same default compare across runs, days and drift, which times do not.
        """
        if self.failure:
            return None
        return quantile([t / d for t, d in zip(self.times_ms, self.default_times_ms, strict=True)], 0.5)

    @property
    def median_ms(self) -> float | None:
        """Its own median; None if it failed."""
        return None if self.failure else quantile(self.times_ms, 0.5)

    @staticmethod
    def failed(
        stage: str, error: HSACompileError, resources: Resources | None = None, seconds: float = 0.0
    ) -> "Outcome":
        """A candidate that is out."""
        return Outcome(
            stage=stage, failure=type(error).__name__, reason=str(error)[:500], resources=resources, seconds=seconds
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Outcome":
        """The outcome that `to_dict` gave.

        Raises:
            InvalidArgument, KeyError, TypeError: a field is missing, unknown or out of range.
        """
        resources = values["resources"]
        times = {name: tuple(values[name]) for name in ("times_ms", "default_times_ms")}
        return Outcome(**{**values, **times, "resources": None if resources is None else Resources(**resources)})


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
