"""The tuning of one problem, from its inputs to a stored record: `tune`, `tune_missing` and `set_autotune`."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

import torch

from hsa_compile.autotune.bench.bench import FAILURES, Bench
from hsa_compile.autotune.bench.device import check_memory, clocks_mhz
from hsa_compile.autotune.evaluate import CLEARLY_SLOWER
from hsa_compile.autotune.options import TuneOptions
from hsa_compile.autotune.play_off import (
    CONFIDENCE,
    MIN_ROUNDS,
    Dropped,
    TimesByInputs,
    Verdict,
    dropped_text,
    play_off,
)
from hsa_compile.autotune.search import SearchResult, Trial
from hsa_compile.autotune.session import Session
from hsa_compile.autotune.study.ledger import default_ledger
from hsa_compile.autotune.study.storage import answering, default_storage
from hsa_compile.checks import MAX_TEXT, check_choice, one_line
from hsa_compile.errors import HSACompileError, InvalidTarget
from hsa_compile.kernels.emit import emit
from hsa_compile.kernels.resolve import set_on_miss
from hsa_compile.log import logger, progress_bar
from hsa_compile.problem import Problem
from hsa_compile.schedules.cache import default_cache
from hsa_compile.schedules.record import TuningRecord, failed_in_passing, num_passing
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.target import Target, gpu_index
from hsa_compile.versions import installed_versions

MODES = ("off", "on-miss")  # what `set_autotune` takes

_MAX_FINALISTS = 8
_PLAY_OFF_ROUNDS = 15
_PLAY_OFF_SHARE = 0.2  # the share of the time that the play-off gets
_NEAR_BEST = 0.1  # the share of time that a schedule which serves all distributions may lose on each


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The state of a running search, for a progress bar.

    Attributes:
        problem: what is being tuned.
        tried, max_trials: how many candidates all workers tried so far, and may try at most.
        best_ms, default_ms: the median times of the best candidate so far and of the default.
        schedule: the best schedule so far.
        elapsed_s, timeout_s: the seconds since the tuning began, and those it may take.
        failures: how many candidates failed so far, by the name of the error.
    """

    problem: Problem
    tried: int
    max_trials: int
    best_ms: float
    default_ms: float
    schedule: Schedule
    elapsed_s: float
    timeout_s: float
    failures: dict[str, int]


def tune(
    problem: Problem,
    target: Target | None = None,
    options: TuneOptions | None = None,
    *,
    device: str | torch.device | Sequence[str] | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    on_record: Callable[[TuningRecord], object] = lambda record: None,
    **changes: Any,
) -> TuningRecord:
    """Searches the best schedule of one problem on the device at hand. It stores none: `ScheduleCache.put` does.

    The default schedule is the first trial; then come winners for similar problems, and the one that the model ranks
    best. Every candidate is checked against the reference, then timed in turns with the default; the best few meet
    the default once more in a play-off, and the default stays unless it is beaten by more than noise.

    Args:
        problem: what to tune.
        target: what the device is; it is found out if None.
        options: how to search; the defaults of `TuneOptions` if None.
        device: where to run; the target's own by default (`cpu` or `cuda`). Several of a kind search at once.
        on_progress: called after each candidate.
        should_stop: asked before each candidate; once it says so, a play-off of what there is ends the search, and
            the record is marked incomplete. A play-off that has begun is cut short.
        on_record: called with the record before the study is marked as done; what it raises leaves the study as it is.
            It is not called where the search was too small (`TuningRecord.shortfall`): the next one goes on with its
            study.
        changes: fields of `TuneOptions` that replace those of `options`: `trials=20`, `timeout=30`, `seed=1`, …

    Raises:
        InvalidArgument: an option is out of range.
        InvalidProblem: the problem's tensors do not fit in the memory that is free.
        InvalidTarget: the target's device is not the one at hand, or several devices are of different kinds.
        StorageError, MissingDependency: the study's storage cannot be opened, or does not answer any more.
        CompileError, OutOfResources, WrongResult, CandidateCrashed, CandidateError, TimedOut: the default schedule
            itself fails.
    """
    chosen = replace(options or TuneOptions(), **changes)
    devices = _devices(target, device)
    target = _target_of(devices)
    for place in devices:
        check_memory(problem, torch.device(place))
    start = time.monotonic()
    deadline = start + chosen.timeout

    def report(result: SearchResult) -> None:
        if result.trials:
            on_progress(_progress(problem, chosen, result, time.monotonic() - start))

    with answering(chosen.storage), Session(problem, target, devices, chosen) as session:
        result = session.run(start + chosen.timeout * (1 - _PLAY_OFF_SHARE), should_stop, report)
        stopped = should_stop()
        timer = TimesByInputs(session.main_bench, session.inputs)
        verdict = _decide(session, result, timer, time.monotonic() if stopped else deadline, should_stop)
        record = TuningRecord(
            problem=problem,
            target=target,
            schedule=verdict.winner,
            measurement=verdict.measurement,
            default_measurement=verdict.default_measurement,
            trials=result.num_tried,
            failures=dict(result.failures),
            inputs=session.label,
            fingerprint=emit(problem, verdict.winner, target).fingerprint,
            versions=installed_versions(),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            verdict=one_line(verdict.text + conflict(result.trials, verdict.winner), MAX_TEXT - 1),
            tie_set=verdict.tie_set,
            confidence=CONFIDENCE,
            clocks_mhz=clocks_mhz(devices[0]),
            complete=not stopped and not failed_in_passing(result.failures, result.num_tried),
            by_inputs=timer.pairs(verdict.winner, session.first[0]),
        )
        if record.shortfall is None:
            on_record(record)
        # A new study tries again what failed for a reason that may pass; this one takes it for tried.
        if not stopped and (record.shortfall is None or num_passing(result.failures)):
            session.finish(record)
    return record


def tune_missing(
    problem: Problem,
    target: Target,
    options: TuneOptions | None = None,
    *,
    device: str | Sequence[str] | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[TuningRecord, bool]:
    """Tunes a problem unless the cache holds the record of a finished search, and stores the winner.

    A search that was interrupted goes on with its study. Nothing is stored where there was time for too few
    candidates (`TuningRecord.shortfall`), and an interrupted search does not replace the record of a finished one. The
    record of a search on other inputs than the options ask for is none of theirs.

    Args:
        problem, target: what to tune, and for which device.
        options: how to search. With `anew`, a finished search is done again. Study and ledger lie beside the schedules
            unless the options name others.
        device, on_progress, should_stop: as in `tune`.

    Returns:
        the record, and whether it was in the cache already.

    Raises:
        HSACompileError: as in `tune`.
    """
    chosen, cache = options or TuneOptions(), default_cache()
    if (found := cache.finished(problem, target)) and chosen.takes(found.inputs):
        return found, True
    chosen = replace(
        chosen,
        storage=chosen.storage or default_storage(target),
        ledger=chosen.ledger or default_ledger(target),
    )
    record = tune(
        problem,
        None if device else target,
        chosen,
        device=device,
        on_progress=on_progress,
        should_stop=should_stop,
        on_record=cache.put,
    )
    return record, False


def _progress(problem: Problem, options: TuneOptions, result: SearchResult, elapsed_s: float) -> Progress:
    default = result.trials[0]  # the default is the first to be tried
    return Progress(
        problem=problem,
        tried=result.num_tried,
        max_trials=options.trials + result.num_known,
        best_ms=result.best.median_ms,
        default_ms=default.median_ms,
        schedule=result.best.schedule,
        elapsed_s=elapsed_s,
        timeout_s=options.timeout,
        failures=dict(result.failures),
    )


def conflict(trials: Sequence[Trial], winner: Schedule) -> str:
    """Says so if no schedule that was timed is near the best one on each of several distributions.

    The ratios of a schedule that was dropped early come from few rounds.
    """
    own = next((trial for trial in trials if trial.schedule == winner), None)
    if own is None or not own.ratios:
        return ""
    best = {name: _best_on(name, trials) for name in own.ratios}

    def most_lost(trial: Trial) -> float:
        return max(trial.ratios[name] / best[name].ratios[name] - 1 for name in best)

    if min(map(most_lost, trials)) <= _NEAR_BEST:
        return ""
    alone = ", ".join(
        f"{one.schedule} takes {one.ratios[name] / own.ratios[name]:.2f} times its time on {name}"
        for name, one in best.items()
        if one.schedule != winner
    )
    return f"; none is within {_NEAR_BEST:.0%} of the best on all of {', '.join(best)}: {alone}"


def _best_on(name: str, trials: Sequence[Trial]) -> Trial:
    return min(trials, key=lambda trial: trial.ratios[name])


def _decide(
    session: Session, result: SearchResult, timer: TimesByInputs, deadline: float, should_stop: Callable[[], bool]
) -> Verdict:
    """Holds the play-off of the best few, in the order of the space, which does not depend on their times."""
    default = session.first[0]
    typical_ms = result.trials[0].median_ms if result.trials else 1.0
    slowest = CLEARLY_SLOWER * result.best.ratio if result.trials else 0.0
    others = sorted(
        (trial for trial in result.trials if trial.schedule != default and trial.ratio <= slowest),
        key=lambda trial: trial.ratio,
    )
    bench = session.main_bench
    typical_ms *= len(session.inputs)
    finalists, dropped = _ready(bench, (trial.schedule for trial in others), _num_finalists(typical_ms, deadline))
    space = SearchSpace.of(session.problem, session.target)
    ordered = [schedule for schedule in space.schedules() if schedule in finalists]
    known = {trial.schedule: trial.resources for trial in result.trials}
    verdict = play_off(
        default,
        ordered,
        timer.time,
        max_rounds=_PLAY_OFF_ROUNDS,
        deadline=deadline,
        should_stop=should_stop,
        resources=known.get,
    )
    return replace(verdict, text=verdict.text + dropped_text(dropped))


def _ready(bench: Bench, schedules: Iterable[Schedule], count: int) -> tuple[set[Schedule], Dropped]:
    """Prepares schedules on a bench; returns the first `count` that can be timed, and why others cannot."""
    ready, dropped = set[Schedule](), dict[Schedule, HSACompileError]()
    for schedule in schedules:
        if len(ready) == count:
            break
        try:
            bench.prepare(schedule)
            ready.add(schedule)
        except FAILURES as error:
            dropped[schedule] = error
    return ready, dropped


def _num_finalists(typical_ms: float, deadline: float) -> int:
    """Returns how many can play all rounds that are needed in the time that is left, at least one."""
    affordable = (deadline - time.monotonic()) * 1e3 / (MIN_ROUNDS * typical_ms) - 1
    return max(1, min(_MAX_FINALISTS, int(affordable)))


def _devices(target: Target | None, device: str | torch.device | Sequence[str] | None) -> list[str]:
    """Returns the names of the devices to run on.

    Raises:
        InvalidTarget: a name is unknown, or the target is not what is at hand.
    """
    if device is None:
        kind = (target or Target.current()).kind
        place = "cpu" if kind == "cpu" else "cuda:0"
        if target is not None and (found := Target.of(torch.device(place))) != target:
            raise InvalidTarget(f"target {target.name} is not the device at hand, {found.name}")
        return [place]
    names = [str(device)] if isinstance(device, str | torch.device) else list(device)
    for name in names:
        if name not in ("cpu", "cuda") and gpu_index(name) is None:
            raise InvalidTarget(f"device {name!r} is not known; allowed are cpu, cuda and cuda:N")
    return names


def _target_of(devices: Sequence[str]) -> Target:
    """Returns the target that the devices are, which must be the same for all, since their times are compared."""
    targets = [Target.parse(device) for device in devices]
    for device, target in zip(devices, targets, strict=True):
        if target != targets[0]:
            raise InvalidTarget(
                f"device {device!r} is {target.name} and {devices[0]!r} {targets[0].name}; allowed are equal devices"
            )
    return targets[0]


def set_autotune(mode: str, **changes: Any) -> None:
    """Sets what a call of an op does if its problem was never tuned.

    Args:
        mode: with `off`, the default, the call runs the nearest schedule or the default one. With `on-miss`, it says
            what it does, tunes its problem first, on the device that it is called on, and stores the winner, which
            every later call, in this process or another, finds.
        changes: fields of `TuneOptions` for those searches, such as `timeout=20` seconds for each.

    Raises:
        InvalidArgument: the mode is neither of these, or an option is out of range.
    """
    check_choice("autotune", mode, MODES)
    options = replace(TuneOptions(), **changes)

    def tune_on_miss(problem: Problem, target: Target) -> None:
        _tune(problem, target, options)

    set_on_miss(tune_on_miss if mode == "on-miss" else None)


@contextlib.contextmanager
def search_bar(problem: Problem, options: TuneOptions) -> Iterator[Callable[[Progress], None]]:
    """Shows a search as a bar while the context is open, and yields what `tune` takes as `on_progress`."""
    text = "{desc} {bar} {n_fmt}/{total_fmt}{postfix}"
    with progress_bar(options.trials, f"{problem.op:12}", unit="trial", bar_format=text) as bar:

        def show(progress: Progress) -> None:
            failed = f", {sum(progress.failures.values())} failed" if progress.failures else ""
            best = f"best {progress.best_ms:.3g} ms ({progress.default_ms / progress.best_ms:.2f}x)"
            bar.set_postfix_str(f"{best}{failed}, {_seconds_left(progress):.0f} s left", refresh=False)
            bar.total = progress.max_trials
            bar.update(progress.tried - bar.n)

        yield show


def _seconds_left(progress: Progress) -> float:
    """Returns the seconds until the trials run out at the pace so far, or the time does."""
    by_trials = progress.elapsed_s / progress.tried * (progress.max_trials - progress.tried)
    return max(0.0, min(by_trials, progress.timeout_s - progress.elapsed_s))


def _tune(problem: Problem, target: Target, options: TuneOptions) -> None:
    """Tunes and stores, and says before that why the call will take long."""
    print(
        f"hsa-compile: tuning {problem.describe()} on {target.name}, once, for at most {options.timeout:.0f} s; "
        "hsa_compile.set_autotune('off') runs a default schedule at once",
        file=sys.stderr,
        flush=True,
    )
    with search_bar(problem, options) as show:
        record, _ = tune_missing(problem, target, options, on_progress=show)
    if record.shortfall:
        logger.info("%s: nothing is stored: %s", problem.describe(), record.shortfall)
