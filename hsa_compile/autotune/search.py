"""Which schedules to try: Optuna asks, we check and time, the loop is ours."""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna

from hsa_compile.autotune.candidate import Candidate
from hsa_compile.autotune.measure import quantile
from hsa_compile.errors import CompileError, OutOfResources, WrongResult
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.target import Target

_MAX_IDLE_ASKS = 16  # in a row that name nothing new: then one untried point is drawn at random
_STARTUP_TRIALS = 8

Prepare = Callable[[Schedule], Candidate]
TimePair = Callable[[Candidate, Candidate], tuple[Sequence[float], Sequence[float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One candidate that was timed.

    Attributes:
        candidate: what was timed.
        ratio: median of its time over the default's in the same round.
        median_ms: its own median.
    """

    candidate: Candidate
    ratio: float
    median_ms: float


@dataclass(slots=True, kw_only=True)
class SearchResult:
    """What a search found: timed trials in the order they were made, and how many failed in which way."""

    trials: list[Trial] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def num_tried(self) -> int:
        """Candidates that cost time: timed or failed."""
        return len(self.trials) + self.failures.total()

    @property
    def best(self) -> Trial:
        """The trial with the least ratio."""
        return min(self.trials, key=lambda trial: trial.ratio)


def search(
    problem: Problem,
    target: Target,
    *,
    first: Sequence[Schedule],
    prepare: Prepare,
    time_pair: TimePair,
    max_trials: int,
    deadline: float,
    seed: int,
    on_trial: Callable[[SearchResult], None] = lambda result: None,
) -> SearchResult:
    """Tries schedules until the trials, the time or the space run out.

    Args:
        first: tried before anything is sampled; the first of them is the default, which all are compared with.
        prepare: makes a schedule a checked candidate.
        time_pair: interleaved times of two candidates.
        max_trials: candidates to try, the default included.
        deadline: `time.monotonic()` after which no new candidate but the default begins.
        seed: of the sampler.
        on_trial: called after each candidate.

    Raises:
        CompileError, OutOfResources, WrongResult: the default schedule itself fails.
    """
    result = SearchResult()
    default = prepare(first[0])
    default_times, again = time_pair(default, default)
    result.trials.append(Trial(candidate=default, ratio=1.0, median_ms=quantile([*default_times, *again], 0.5)))
    on_trial(result)
    for schedule, tell in _proposals(problem, target, first, seed):
        if result.num_tried >= max_trials or time.monotonic() >= deadline:
            break
        try:
            candidate = prepare(schedule)
        except (CompileError, OutOfResources, WrongResult) as error:
            result.failures[type(error).__name__] += 1
            tell(None)
        else:
            times, default_times = time_pair(candidate, default)
            ratio = quantile([t / d for t, d in zip(times, default_times, strict=True)], 0.5)
            result.trials.append(Trial(candidate=candidate, ratio=ratio, median_ms=quantile(times, 0.5)))
            tell(ratio)
        on_trial(result)
    return result


def _proposals(
    problem: Problem, target: Target, first: Sequence[Schedule], seed: int
) -> Iterator[tuple[Schedule, Callable[[float | None], None]]]:
    """New valid schedules and where to report them, until none is left.

    Points that are invalid or known go straight back to Optuna, at no cost.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = SearchSpace.of(problem, target)
    valid = list(space.schedules(problem, target))
    random.Random(seed).shuffle(valid)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_STARTUP_TRIALS)
    study = optuna.create_study(sampler=sampler, direction="minimize")
    for schedule in first:
        study.enqueue_trial(_parameters(schedule))
    known: dict[Schedule, float | None] = {first[0]: 1.0}
    idle = 0
    while untried := [schedule for schedule in valid if schedule not in known]:
        if idle == _MAX_IDLE_ASKS:
            study.enqueue_trial(_parameters(untried[0]))
        trial = study.ask()
        schedule = _suggest(trial, space)
        if schedule in known or not space.is_valid(problem, schedule, target):
            _tell(study, trial, known.get(schedule))
            idle += 1
            continue
        idle = 0

        def report(ratio: float | None, trial: optuna.Trial = trial, schedule: Schedule = schedule) -> None:
            known[schedule] = ratio
            _tell(study, trial, ratio)

        yield schedule, report


def _suggest(trial: optuna.Trial, space: SearchSpace) -> Schedule:
    dataflow = trial.suggest_categorical("dataflow", list(space.choices))
    knobs: dict[str, Any] = {
        name: trial.suggest_categorical(f"{dataflow}.{name}", choices)
        for name, choices in space.choices[dataflow].items()
    }
    return Schedule.of(dataflow, **knobs)


def _parameters(schedule: Schedule) -> dict[str, object]:
    knobs = {f"{schedule.dataflow}.{name}": value for name, value in schedule.knobs}
    return {"dataflow": schedule.dataflow, **knobs}


def _tell(study: optuna.Study, trial: optuna.Trial, ratio: float | None) -> None:
    if ratio is None:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    else:
        study.tell(trial, ratio)
