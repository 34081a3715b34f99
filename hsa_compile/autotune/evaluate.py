"""The evaluation of one candidate, from compiling to times, in stages: most of the bad are dropped at a cheap one.

Where a search is for several distributions of picks together, a time is the geometric mean of theirs.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hsa_compile.autotune.bench.bench import FAILURES, Bench, quantile
from hsa_compile.autotune.cost.roofline import Resources
from hsa_compile.checks import check_choice, check_number, check_text, from_mapping, shown
from hsa_compile.errors import CompileTimedOut, HSACompileError, InvalidArgument, OutOfResources, TimedOut
from hsa_compile.problem import DISTRIBUTIONS
from hsa_compile.schedules.record import MAX_MS, MIN_MS
from hsa_compile.schedules.schedule import Schedule

STAGES = ("resources", "prepare", "quick", "full")  # each is dearer than the one before
QUICK_ROUNDS = 3  # rounds of the quick timings; where the default takes long, two calls around one of the default
MAX_MORE_ROUNDS = 4
CLEARLY_SLOWER = 1.25  # a candidate slower than the best so far by this factor gets quick timings only, no play-off
FAR_SLOWER = 3.0  # a candidate slower than the best so far by this factor gets one call, where the default takes long

_LONG_MS = 10.0  # if the default takes longer, one call shows whether a candidate is far slower
_MS_A_ROUND = 100.0  # what a further round may take; slower candidates get fewer rounds


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a candidate: it was timed, in turns with the default, or it failed.

    Attributes:
        stage: how far it came: refused for its compiled resources, failed while it was compiled or checked,
            dropped after the quick timings, or timed in full.
        times_ms, default_times_ms: the candidate's and the default's times in the same rounds; empty if it failed.
        ratios: its ratio on each of several distributions; empty where the search is for one.
        failure, reason: the name of the error and its message; empty if the candidate was timed.
        fingerprint: the digest of the candidate's source; empty if it failed.
        resources: what the candidate uses, where the compiler tells.
        seconds: how long all this took, compiling ahead not counted.
    """

    stage: str
    times_ms: tuple[float, ...] = ()
    default_times_ms: tuple[float, ...] = ()
    ratios: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""
    reason: str = ""
    fingerprint: str = ""
    resources: Resources | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        check_choice("stage", self.stage, STAGES)
        for name in ("failure", "fingerprint"):
            check_text(name, getattr(self, name))
        for name, kind in (("reason", str), ("times_ms", tuple), ("default_times_ms", tuple)):
            if not isinstance(getattr(self, name), kind):
                raise InvalidArgument(f"{name} = {shown(getattr(self, name))} must be a {kind.__name__}")
        if not isinstance(self.resources, Resources | None):
            raise InvalidArgument(f"resources = {shown(self.resources)} must be Resources or None")
        check_number("seconds", self.seconds, 0, MAX_MS)
        if bool(self.failure) == bool(self.times_ms) or len(self.times_ms) != len(self.default_times_ms):
            raise InvalidArgument(
                f"an outcome has a failure or pairs of times, not {self.failure!r} with {len(self.times_ms)} times "
                f"and {len(self.default_times_ms)} of the default"
            )
        for time_ms in (*self.times_ms, *self.default_times_ms):
            check_number("a time", time_ms, MIN_MS, MAX_MS)
        if not isinstance(self.ratios, Mapping):
            raise InvalidArgument(f"ratios = {shown(self.ratios)} must be a mapping of names to numbers")
        for name, ratio in self.ratios.items():
            check_text("a name in ratios", name)
            check_number(f"ratios of {shown(name)}", ratio, MIN_MS / MAX_MS, MAX_MS / MIN_MS)

    @property
    def ratio(self) -> float | None:
        """The median, over the rounds, of its time divided by the default's; None if it failed.

        Ratios to the same default compare across runs, days and drift, which times do not.
        """
        return None if self.failure else median_ratio(self.times_ms, self.default_times_ms)

    @property
    def median_ms(self) -> float | None:
        """The median of its times; None if it failed."""
        return None if self.failure else quantile(self.times_ms, 0.5)

    @staticmethod
    def failed(
        stage: str, error: HSACompileError, resources: Resources | None = None, seconds: float = 0.0
    ) -> "Outcome":
        """Returns the outcome of a candidate that is out."""
        return Outcome(
            stage=stage, failure=type(error).__name__, reason=str(error)[:500], resources=resources, seconds=seconds
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, ready for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(values: object) -> "Outcome":
        """Returns the outcome that `to_dict` gave the values of.

        Raises:
            InvalidArgument: a field is missing, unknown or out of range.
        """
        fields = dict(values) if isinstance(values, Mapping) else values
        if isinstance(fields, dict):
            for name in ("times_ms", "default_times_ms"):
                if isinstance(fields.get(name), list):
                    fields[name] = tuple(fields[name])
            if isinstance(fields.get("resources"), Mapping):
                fields["resources"] = from_mapping(Resources, fields["resources"])
        return from_mapping(Outcome, fields)


Times = dict[str, list[float]]  # a candidate's times on each distribution, round by round


def time_on_all(bench: Bench, schedules: Sequence[Schedule], rounds: int, inputs: Sequence[str]) -> list[Times]:
    """Returns interleaved times of several candidates on each distribution that a search is for."""
    found: list[Times] = [{} for _ in schedules]
    for name in inputs:
        # A bench that has one distribution need not be told which.
        times = bench.time(schedules, rounds) if len(inputs) == 1 else bench.time(schedules, rounds, name)
        for one, own in zip(found, times, strict=True):
            one[name] = own
    return found


def together(times: Times) -> list[float]:
    """Returns the geometric mean over the distributions, round by round."""
    return [math.prod(found) ** (1 / len(found)) for found in zip(*times.values(), strict=True)]


def median_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Returns the median, over the rounds, of a time divided by the other of the same round."""
    return quantile([t / o for t, o in zip(times, others, strict=True)], 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """The default schedule, ready on the bench, with which candidates are compared.

    Attributes:
        schedule: the default, which all are timed in turns with.
        inputs: the names of the distributions that all are timed on.
        outcome: what became of the default when it was timed against itself.
    """

    schedule: Schedule
    inputs: tuple[str, ...]
    outcome: Outcome

    @property
    def median_ms(self) -> float:
        """The median of the default's times."""
        assert self.outcome.median_ms is not None
        return self.outcome.median_ms


def failure_of_default(error: HSACompileError, default: Schedule) -> HSACompileError:
    """Returns an error that says of the default schedule what a bench said of a candidate."""
    advice = ""
    if isinstance(error, TimedOut):
        limit = "compile_s" if isinstance(error, CompileTimedOut) else "first_s"
        advice = f"; `{limit}` of `TuneOptions.limits` allows more, and a machine with less to do needs less"
    return type(error)(
        f"the default schedule, {default}, failed, and without it nothing can be compared: {error}{advice}"
    )


def measure_default(
    schedule: Schedule,
    bench: Bench,
    *,
    inputs: Sequence[str] = (DISTRIBUTIONS[0],),
    compiled: Callable[[], Resources | None] | None = None,
) -> Baseline:
    """Prepares the default schedule and times it.

    Args:
        schedule: the default.
        bench: where it is prepared and timed.
        inputs: the names of the distributions that the bench has.
        compiled: as in `evaluate`.

    Raises:
        HSACompileError: the default fails; without it there is nothing to compare with.
    """
    start = time.monotonic()
    try:
        resources = compiled() if compiled else bench.compile(schedule)
        fingerprint = bench.prepare(schedule)
        first, second = time_on_all(bench, [schedule, schedule], QUICK_ROUNDS, inputs)
    except FAILURES as error:
        raise failure_of_default(error, schedule) from error
    times = (*together(first), *together(second))
    outcome = Outcome(
        stage="full",
        times_ms=times,
        default_times_ms=times,
        ratios={} if len(inputs) == 1 else dict.fromkeys(inputs, 1.0),
        fingerprint=fingerprint,
        resources=resources,
        seconds=time.monotonic() - start,
    )
    return Baseline(schedule=schedule, inputs=tuple(inputs), outcome=outcome)


def evaluate(
    schedule: Schedule,
    bench: Bench,
    baseline: Baseline,
    *,
    best_ratio: float,
    compiled: Callable[[], Resources | None] | None = None,
    more_rounds: int = MAX_MORE_ROUNDS,
) -> Outcome:
    """Compiles, checks and times one candidate, as far as it is worth it.

    Args:
        schedule: the candidate.
        bench: where it is prepared and timed.
        baseline: the default that it is compared with.
        best_ratio: the least ratio so far. A candidate that is `CLEARLY_SLOWER` gets the quick timings only; one that
            is `FAR_SLOWER` gets one call only, if the default takes long enough for one to tell.
        compiled: waits for what the candidate uses, if it is compiled elsewhere; by default the bench compiles it.
        more_rounds: how many rounds may follow the quick timings.
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
        times, default_times = time_on_all(bench, pair, 1 if is_long else QUICK_ROUNDS, baseline.inputs)
        if is_long and together(times)[0] <= FAR_SLOWER * best_ratio * together(default_times)[0]:
            # One call comes before the default's, one after it: compared with both, drift cancels out.
            (again,) = time_on_all(bench, [schedule], 1, baseline.inputs)
            times, default_times = _joined(times, again), _joined(default_times, default_times)
        outcome = _timed(stage, times, default_times, fingerprint, resources, start)
        assert outcome.ratio is not None
        round_ms = 2 * baseline.median_ms * len(baseline.inputs)
        more = min(more_rounds, int(more_rounds * _MS_A_ROUND / round_ms))
        if outcome.ratio > CLEARLY_SLOWER * best_ratio or more < 1:
            return outcome
        stage = "full"
        more_times, more_default_times = time_on_all(bench, pair, more, baseline.inputs)
        times, default_times = _joined(times, more_times), _joined(default_times, more_default_times)
        return _timed(stage, times, default_times, fingerprint, resources, start)
    except FAILURES as error:
        return Outcome.failed(stage, error, resources, time.monotonic() - start)


def _joined(times: Times, more: Times) -> Times:
    return {name: [*own, *more[name]] for name, own in times.items()}


def _timed(
    stage: str,
    times: Times,
    default_times: Times,
    fingerprint: str,
    resources: Resources | None,
    start: float,
) -> Outcome:
    return Outcome(
        stage=stage,
        times_ms=tuple(together(times)),
        default_times_ms=tuple(together(default_times)),
        ratios={} if len(times) == 1 else {name: median_ratio(own, default_times[name]) for name, own in times.items()},
        fingerprint=fingerprint,
        resources=resources,
        seconds=time.monotonic() - start,
    )
