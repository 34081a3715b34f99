"""The search for one problem, from inputs to a record."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

import torch

from hsa_compile.autotune.candidate import Candidate, prepare
from hsa_compile.autotune.measure import measure
from hsa_compile.autotune.memory import check_memory
from hsa_compile.autotune.play_off import MIN_ROUNDS, play_off
from hsa_compile.autotune.search import SearchResult, search
from hsa_compile.autotune.select_inputs import inputs_of
from hsa_compile.errors import InvalidArgument, InvalidTarget
from hsa_compile.problem import Problem
from hsa_compile.schedules.cache import default_cache
from hsa_compile.schedules.default import default_schedule
from hsa_compile.schedules.record import TuningRecord
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import Target
from hsa_compile.versions import installed_versions

DEFAULT_TRIALS = 40
DEFAULT_TIMEOUT_S = 45.0
MAX_SEED = 2**32 - 1  # of Optuna's sampler

_PAIRS = 3  # rounds in which a trial is timed against the default
_MAX_FINALISTS = 4
_PLAY_OFF_ROUNDS = 15
_PLAY_OFF_SHARE = 0.25  # of the time


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """State of a running search, for a progress bar.

    Attributes:
        problem: what is being tuned.
        tried, max_trials: candidates so far, and at most.
        best_ms, default_ms: medians so far.
        schedule: the best so far.
        elapsed_s, timeout_s: of the whole tuning.
    """

    problem: Problem
    tried: int
    max_trials: int
    best_ms: float
    default_ms: float
    schedule: Schedule
    elapsed_s: float
    timeout_s: float


def tune(
    problem: Problem,
    target: Target | None = None,
    *,
    device: str | torch.device | None = None,
    trials: int = DEFAULT_TRIALS,
    timeout: float = DEFAULT_TIMEOUT_S,
    seed: int = 0,
    distribution: str = "random",
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> TuningRecord:
    """Searches the schedule of one problem on the device at hand. Stores nothing: `ScheduleCache.put` does.

    The default schedule is the first trial, the nearest tuned problem's the second. Every candidate is checked
    against the reference, then timed in turns with the default; the best few meet the default once more in a
    play-off, and the default stays unless it is beaten by more than the noise.

    Args:
        problem: what to tune.
        target: of the device; found out if None.
        device: to run on; the target's own by default (`cpu` or `cuda`).
        trials: candidates to try at most, the default included.
        timeout: seconds for everything; the play-off gets a quarter.
        seed: of the sampler and the inputs.
        distribution: of the picks, one of `inputs.DISTRIBUTIONS`.
        on_progress: called after each candidate.

    Raises:
        InvalidArgument: trials, timeout or seed out of range.
        InvalidProblem: its tensors do not fit in the memory that is free.
        InvalidTarget: the target's device is not the one at hand.
        CompileError, OutOfResources, WrongResult: the default schedule itself fails.
    """
    check_limits(trials, timeout, seed)
    place = _device(target, device)
    target = Target.of(place)
    check_memory(problem, place)
    start = time.monotonic()
    deadline = start + timeout
    inputs = inputs_of(problem, place, distribution=distribution, seed=seed)

    def time_all(candidates: Sequence[Candidate], rounds: int) -> list[list[float]]:
        return measure([candidate.call for candidate in candidates], place, rounds=rounds)

    def time_pair(one: Candidate, other: Candidate) -> tuple[list[float], list[float]]:
        first, second = time_all([one, other], _PAIRS)
        return first, second

    def report(result: SearchResult) -> None:
        on_progress(
            Progress(
                problem=problem,
                tried=result.num_tried,
                max_trials=trials,
                best_ms=result.best.median_ms,
                default_ms=result.trials[0].median_ms,
                schedule=result.best.candidate.schedule,
                elapsed_s=time.monotonic() - start,
                timeout_s=timeout,
            )
        )

    result = search(
        problem,
        target,
        first=_first_schedules(problem, target),
        prepare=lambda schedule: prepare(problem, schedule, target, inputs),
        time_pair=time_pair,
        max_trials=trials,
        deadline=start + timeout * (1 - _PLAY_OFF_SHARE),
        seed=seed,
        on_trial=report,
    )
    default, *others = result.trials
    finalists = sorted(others, key=lambda trial: trial.ratio)[: _num_finalists(default.median_ms, deadline)]
    verdict = play_off(
        default.candidate,
        [trial.candidate for trial in finalists],
        time_all,
        max_rounds=_PLAY_OFF_ROUNDS,
        deadline=deadline,
    )
    return TuningRecord(
        problem=problem,
        target=target,
        schedule=verdict.winner.schedule,
        measurement=verdict.measurement,
        default_measurement=verdict.default_measurement,
        trials=result.num_tried,
        failures=dict(result.failures),
        inputs=distribution,
        fingerprint=verdict.winner.fingerprint,
        versions=installed_versions(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def check_limits(trials: int, timeout: float, seed: int) -> None:
    """Whether a search may run so long and so seeded.

    Raises:
        InvalidArgument: a value is out of range; the message shows it and what is allowed.
    """
    if trials < 1:
        raise InvalidArgument(f"trials = {trials} must be at least 1")
    if not timeout > 0:
        raise InvalidArgument(f"timeout = {timeout} must be more than 0 seconds")
    if not 0 <= seed <= MAX_SEED:
        raise InvalidArgument(f"seed = {seed} must be in 0 … {MAX_SEED}")


def _num_finalists(default_ms: float, deadline: float) -> int:
    """As many as can play all rounds that are needed in the time that is left, one at least."""
    affordable = (deadline - time.monotonic()) * 1e3 / (MIN_ROUNDS * default_ms) - 1
    return max(1, min(_MAX_FINALISTS, int(affordable)))


def _first_schedules(problem: Problem, target: Target) -> list[Schedule]:
    """The default, then what the nearest tuned problem uses."""
    first = [default_schedule(problem, target)]
    if found := default_cache().lookup(problem, target):
        first.append(found.schedule)
    return first


def _device(target: Target | None, device: str | torch.device | None) -> torch.device:
    if device is not None:
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise InvalidTarget(f"device {device!r} is not known; allowed are cpu, cuda and cuda:N") from error
    kind = (target or Target.current()).kind
    place = torch.device("cpu" if kind == "cpu" else "cuda:0")
    if target is not None and Target.of(place) != target:
        raise InvalidTarget(f"target {target.name} is not the device at hand, {Target.of(place).name}")
    return place
