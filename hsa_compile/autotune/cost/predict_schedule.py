"""Predicts a schedule for a GPU that is not there: candidates are compiled for it, and a cost model ranks them.

How well the model ranks is measured by the correlation of its times with measured ones.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from hsa_compile.autotune.bench.isolation import CompilePool, IsolatedBench
from hsa_compile.autotune.cost.roofline import estimate
from hsa_compile.autotune.options import Limits
from hsa_compile.errors import HSACompileError, InvalidArgument, InvalidTarget, OutOfResources
from hsa_compile.kernels.ahead_of_time import KernelResources, compile_launches
from hsa_compile.kernels.compile import compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.peaks import limits_of
from hsa_compile.problem import OPS, Problem
from hsa_compile.schedules.record import PREDICTED, Measurement, TuningRecord
from hsa_compile.schedules.schedule import Knob, Schedule
from hsa_compile.schedules.space import SearchSpace, default_schedule
from hsa_compile.target import Target
from hsa_compile.versions import installed_versions

DEFAULT_BUDGET_S = 75.0
MAX_CANDIDATES = 96
MIN_SCHEDULES = 3  # the fewest that a correlation is computed of
_FEW_CANDIDATES = 6  # candidates for an op that the model cannot rank, in case that its default spills

_NUM_WORKERS = 2
_COMPILE_S = 60.0
# The model says little about these knobs before a candidate is compiled.
_PIPELINE_KNOBS = ("num_warps", "num_stages", "chunk_warps", "chunk_stages")
_VARIANTS_APART = 4  # how many places each further variant of a tile comes after the one before

_Kernels = tuple[KernelResources, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionProgress:
    """The state of a running prediction, for a progress bar.

    Attributes:
        problem: what is predicted.
        compiled, candidates: how many candidates are compiled so far, and will be at most.
        best_ms: the predicted time of the best so far; None before there is one.
        elapsed_s, budget_s: the seconds since the prediction began, and those it may take.
    """

    problem: Problem
    compiled: int
    candidates: int
    best_ms: float | None
    elapsed_s: float
    budget_s: float


@dataclass(slots=True, kw_only=True)
class _Found:
    """The candidates compiled so far: times of those that neither failed nor spilled, and counts of the others."""

    times: dict[Schedule, float] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def compiled(self) -> int:
        return len(self.times) + self.failures.total()


class Compiler:
    """Compiles candidates of one problem, in a worker process, and tells what their kernels use."""

    def __init__(self, problem: Problem, target: Target) -> None:
        self.problem, self.target = problem, target

    def compile(self, schedule: Schedule) -> _Kernels:
        """Returns the resources of a candidate's kernels, without the compiler's texts."""
        kernel = compile_kernel(emit(self.problem, schedule, self.target))
        return tuple(replace(k, asm={}) for k in compile_launches(kernel.module, self.target))


def predict_schedule(
    problem: Problem,
    target: Target,
    *,
    budget_s: float = DEFAULT_BUDGET_S,
    on_progress: Callable[[PredictionProgress], None] = lambda progress: None,
) -> TuningRecord:
    """Predicts the schedule that should be fastest on a GPU, which need not be there. It stores nothing.

    The default schedule and those that the model ranks best are compiled for the target, two at a time. Those that do
    not fit or spill are out; the others are ranked again, by what their kernels use. About ops other than
    `hsa_attention` the model knows too little to prefer anything: their default is taken, if it does not spill.

    Args:
        problem: what is to run.
        target: the device it is to run on: `cuda` or `hip`, with a known architecture.
        budget_s: seconds after which no more candidates are compiled; the default is compiled in any case.
        on_progress: called after each candidate.

    Returns:
        a record of kind `predicted`; the times of the winner and of the default are the model's.

    Raises:
        InvalidArgument: the budget is not positive.
        InvalidTarget: the target is a CPU, or its peaks are not known.
        InvalidSchedule: no schedule at all can run the problem on the target.
        CompileError: the default schedule does not compile.
        OutOfResources: every candidate spills or does not fit.
    """
    if not budget_s > 0:
        raise InvalidArgument(f"budget_s = {budget_s} must be more than 0 seconds")
    check_predictable(target)
    candidates = ranked_candidates(problem, target)
    if problem.op not in OPS:
        candidates = candidates[:_FEW_CANDIDATES]
    found = _compile_all(problem, target, candidates, budget_s, on_progress)
    if not found.times:
        counted = ", ".join(f"{count} {name}" for name, count in found.failures.items())
        raise OutOfResources(f"no candidate for {problem.describe()} on {target.name} is without spills: {counted}")
    default = candidates[0]
    winner = min(found.times, key=lambda schedule: found.times[schedule])
    if problem.op not in OPS and default in found.times:
        winner = default
    default_ms = found.times.get(default) or estimate(problem, default, target)
    return TuningRecord(
        problem=problem,
        target=target,
        schedule=winner,
        measurement=Measurement.predicted(found.times[winner]),
        default_measurement=Measurement.predicted(default_ms),
        trials=found.compiled,
        failures=dict(found.failures),
        inputs="none",
        fingerprint=emit(problem, winner, target).fingerprint,
        versions=installed_versions(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        kind=PREDICTED,
    )


def check_predictable(target: Target) -> None:
    """Raises unless there is a model for a target.

    Raises:
        InvalidTarget: the target is a CPU, or its peaks are not known.
    """
    if target.kind == "cpu":
        raise InvalidTarget("there is no model of CPUs: only the times of GPU kernels can be predicted")
    limits_of(target)


def ranked_candidates(problem: Problem, target: Target) -> list[Schedule]:
    """Returns the default, then what the model ranks best; variants of a tile in warps and stages are spread out."""
    default = default_schedule(problem, target)
    tiles: dict[tuple[tuple[str, Knob], ...], list[Schedule]] = {}
    for schedule in SearchSpace.of(problem, target).schedules():
        tile = tuple(item for item in schedule.items() if item[0] not in _PIPELINE_KNOBS)
        tiles.setdefault(tile, []).append(schedule)
    times = {tile: min(estimate(problem, s, target) for s in variants) for tile, variants in tiles.items()}
    places = []
    for place, tile in enumerate(sorted(tiles, key=lambda tile: times[tile])):
        variants = sorted(tiles[tile], key=lambda schedule: _unlike(schedule, default))
        places += [(place + _VARIANTS_APART * number, variant) for number, variant in enumerate(variants)]
    ordered = [schedule for _, schedule in sorted(places, key=lambda item: item[0])]
    return list(dict.fromkeys([default, *ordered]))[:MAX_CANDIDATES]


def _unlike(schedule: Schedule, default: Schedule) -> int:
    """Counts the pipeline knobs in which a schedule differs from the default, which neither spills nor overflows."""
    return sum(schedule.get(knob) != default.get(knob, schedule.get(knob)) for knob in _PIPELINE_KNOBS)


def _compile_all(
    problem: Problem,
    target: Target,
    candidates: Sequence[Schedule],
    budget_s: float,
    on_progress: Callable[[PredictionProgress], None],
) -> _Found:
    found, start = _Found(), time.monotonic()
    factory = f"{__name__}:{Compiler.__name__}"
    limits = Limits(compile_s=_COMPILE_S)
    compilers = [IsolatedBench(factory, (problem, target), limits=limits) for _ in range(_NUM_WORKERS)]
    with CompilePool(compilers) as pool:
        for schedule, done in _as_compiled(pool, candidates, start + budget_s):
            _judge(problem, target, schedule, done, found, is_default=schedule == candidates[0])
            on_progress(
                PredictionProgress(
                    problem=problem,
                    compiled=found.compiled,
                    candidates=len(candidates),
                    best_ms=min(found.times.values(), default=None),
                    elapsed_s=time.monotonic() - start,
                    budget_s=budget_s,
                )
            )
    return found


def _as_compiled(
    pool: CompilePool, candidates: Sequence[Schedule], deadline: float
) -> Iterator[tuple[Schedule, "Future[_Kernels]"]]:
    """Yields candidates as they are compiled, until the deadline; the first, the default, is yielded in any case."""
    waiting = iter(candidates)
    running: dict[Future[Any], Schedule] = {}
    first_is_out = False
    while True:
        while len(running) < pool.size and (time.monotonic() < deadline or not (running or first_is_out)):
            if (schedule := next(waiting, None)) is None:
                break
            running[pool.submit(schedule)] = schedule
        if not running:
            return
        left = max(0.0, deadline - time.monotonic()) if first_is_out else None
        done, _ = wait(running, timeout=left, return_when=FIRST_COMPLETED)
        if not done:
            return
        for future in done:
            schedule = running.pop(future)
            first_is_out |= schedule == candidates[0]
            yield schedule, future


def _judge(
    problem: Problem, target: Target, schedule: Schedule, done: "Future[_Kernels]", found: _Found, *, is_default: bool
) -> None:
    try:
        kernels = done.result()
    except OutOfResources:
        found.failures[OutOfResources.__name__] += 1
    except HSACompileError as error:
        if is_default:  # no other would compile either: the compiler is missing, or runs as an interpreter
            raise
        found.failures[type(error).__name__] += 1
    else:
        if any(kernel.spills for kernel in kernels):
            found.failures["spills"] += 1
        else:
            found.times[schedule] = estimate(problem, schedule, target, kernels)


def prediction_correlation(problem: Problem, target: Target, times: Mapping[Schedule, float]) -> float:
    """Returns Spearman's rank correlation of predicted with measured times, −1 … 1; NaN where all are equal.

    Args:
        problem, target: what the schedules are for.
        times: the measured time of each schedule.

    Raises:
        InvalidTarget: there is no model for the target; there is none for CPUs.
        InvalidArgument: there are too few schedules.
    """
    check_predictable(target)
    if len(times) < MIN_SCHEDULES:
        raise InvalidArgument(f"{len(times)} measured schedules are too few to correlate; {MIN_SCHEDULES} are needed")
    predicted = [estimate(problem, schedule, target, ()) for schedule in times]
    return spearman(predicted, list(times.values()))


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Returns the correlation of the ranks of two lists of equal length; equal values share their mean rank."""
    left, right = _ranks(one), _ranks(other)
    mean = (len(left) - 1) / 2
    covariance = sum((a - mean) * (b - mean) for a, b in zip(left, right, strict=True))
    spread = math.sqrt(sum((a - mean) ** 2 for a in left) * sum((b - mean) ** 2 for b in right))
    return covariance / spread if spread else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    """Returns each value's rank: how many are less, plus half of the others that are equal."""
    return [sum(v < value for v in values) + (sum(v == value for v in values) - 1) / 2 for value in values]
