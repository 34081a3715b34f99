"""Full sweeps of a kernel's search space: measuring one, its file, and searches replayed on it without the device."""

import gzip
import io
import itertools
import json
import math
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from hsa_compile.autotune.bench.bench import Bench
from hsa_compile.autotune.evaluate import Outcome, evaluate, measure_default
from hsa_compile.autotune.samplers import make_sampler
from hsa_compile.autotune.samplers.point import Point, PointTable, parameters_of
from hsa_compile.autotune.study.ledger import ProblemLedger
from hsa_compile.checks import check_number, check_text, from_mapping, shown
from hsa_compile.errors import InvalidArgument
from hsa_compile.files import MOST_BYTES, parse_json, read_regular, write_whole
from hsa_compile.problem import DISTRIBUTIONS, Problem
from hsa_compile.schedules.record import MAX_COUNT, MAX_MS, MIN_MS
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace, default_schedule
from hsa_compile.target import Target
from hsa_compile.versions import installed_versions

FORMAT, VERSION = "hsa-compile sweep", 1
MORE_ROUNDS = 24  # rounds of a sweep after the quick timings; a search has fewer

_GZIP_MAGIC = b"\x1f\x8b"
_CLOSINGS = ("", "}", "}}")  # Kernel Tuner leaves a cache file open while it may still be added to
_NO_TIME_MS = 1e10  # Kernel Tuner's old mark for a failure is a number above this
_MAX_IDLE_ASKS = 16  # after so many asks in a row that name nothing new, an untried point is drawn, as in a real search


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedSweep:
    """Every valid point of a space with its time, or why it failed.

    Attributes:
        points: the points, each a mapping of parameter → value as Optuna knows them.
        times: the time of each point, in milliseconds or any other unit; None if it failed.
        reasons: why each point failed; empty if it did not.
        about: what else is known: problem, target and versions, or the header of Kernel Tuner's file.
    """

    points: Sequence[Mapping[str, Any]]
    times: Sequence[float | None]
    reasons: Sequence[str]
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.points) == len(self.times) == len(self.reasons):
            raise InvalidArgument(
                f"{len(self.points)} points, {len(self.times)} times and {len(self.reasons)} reasons; "
                "allowed: as many of each"
            )
        if all(time is None for time in self.times):
            raise InvalidArgument(f"none of {len(self.points)} points has a time; allowed: at least one")
        if not isinstance(self.about, Mapping):
            raise InvalidArgument(f"about = {shown(self.about)} must be a mapping")
        for point in self.points:
            _check_point(point)
        for time, reason in zip(self.times, self.reasons, strict=True):
            if time is not None:
                check_number("time", time, MIN_MS, MAX_MS)
            if not isinstance(reason, str) or (time is None) != bool(reason):
                raise InvalidArgument(f"time {shown(time)} with reason {shown(reason)}; allowed: one of the two")

    @property
    def optimum(self) -> float:
        """The least time."""
        return min(time for time in self.times if time is not None)

    @staticmethod
    def of_schedules(results: Mapping[Schedule, float | str], *, problem: Problem, target: Target) -> "RecordedSweep":
        """Makes a sweep from the time of each schedule, or the reason why it failed."""
        return RecordedSweep(
            points=[parameters_of(schedule) for schedule in results],
            times=[None if isinstance(result, str) else float(result) for result in results.values()],
            reasons=[(result or "failed") if isinstance(result, str) else "" for result in results.values()],
            about={"problem": asdict(problem), "target": asdict(target), "versions": installed_versions()},
        )

    def save(self, path: Path) -> None:
        """Writes the sweep as JSON, compressed if the name ends in `.gz`, as a whole or not at all.

        Raises:
            OSError: the file cannot be written; what was there is untouched.
        """
        points = [
            {"parameters": dict(point), **({"failure": reason} if time is None else {"time": time})}
            for point, time, reason in zip(self.points, self.times, self.reasons, strict=True)
        ]
        values = {"format": FORMAT, "version": VERSION, "about": dict(self.about), "points": points}
        text = json.dumps(values, indent=1).encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without a date in the header, equal sweeps are equal files.
        write_whole(path, gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)

    @staticmethod
    def load(path: Path) -> "RecordedSweep":
        """Reads a sweep from a file of our own format or a cache file of Kernel Tuner, compressed or not.

        Raises:
            InvalidArgument: the file is neither.
        """
        try:
            text = _text(read_regular(path))
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise InvalidArgument(f"{path} cannot be read: {error}") from error
        values = _parse(path, text)
        try:
            if values.get("format") == FORMAT:
                return _read_own(path, values)
            if "cache" in values and "tune_params_keys" in values:
                return _read_kernel_tuner(values)
        except InvalidArgument as error:
            raise InvalidArgument(f"{path} is damaged: {error}") from error
        except (LookupError, TypeError, AttributeError) as error:
            raise InvalidArgument(f"{path} is damaged: {type(error).__name__}: {shown(str(error))}") from error
        raise InvalidArgument(f"{path} is neither a file of {FORMAT!r} nor a cache file of Kernel Tuner")


def _text(data: bytes) -> str:
    """Returns a file's text, which may be compressed.

    Raises:
        EOFError, OSError, ValueError, zlib.error: it is damaged, no UTF-8, or longer than any file that is read.
    """
    if not data.startswith(_GZIP_MAGIC):
        return data.decode()
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} bytes")
    return text.decode()


def _check_point(point: object) -> None:
    if not isinstance(point, Mapping) or not point:
        raise InvalidArgument(f"a point is {shown(point)}; allowed: a mapping of parameters to values")
    for name, value in point.items():
        check_text("the name of a parameter", name)
        if isinstance(value, str):
            check_text(name, value)
        elif not isinstance(value, bool | None):
            check_number(name, value, -MAX_COUNT, MAX_COUNT)


def _parse(path: Path, text: str) -> dict[str, Any]:
    text = text.rstrip().rstrip(",")
    for closing in _CLOSINGS:
        try:
            values = parse_json(text + closing)
        except ValueError:
            continue
        if isinstance(values, dict):
            return values
    raise InvalidArgument(f"{path} is not JSON, nor with up to two closing braces added")


def _read_own(path: Path, values: Mapping[str, Any]) -> RecordedSweep:
    if values["version"] != VERSION:
        raise InvalidArgument(f"{path} has version {shown(values['version'])} of its format; allowed is {VERSION}")
    points = values["points"]
    return RecordedSweep(
        points=[point["parameters"] for point in points],
        times=[point.get("time") for point in points],
        reasons=[point.get("failure", "") for point in points],
        about=values["about"],
    )


def _read_kernel_tuner(values: Mapping[str, Any]) -> RecordedSweep:
    names, records = values["tune_params_keys"], values["cache"].values()
    times = [_kernel_tuner_time(record.get("time")) for record in records]
    return RecordedSweep(
        points=[{name: record[name] for name in names} for record in records],
        times=times,
        reasons=["" if time else str(record.get("time")) for time, record in zip(times, records, strict=True)],
        about={name: value for name, value in values.items() if name != "cache"},
    )


def _kernel_tuner_time(value: object) -> float | None:
    """Returns a time, or None for a word or a huge number, which stand for a configuration that failed."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 < value < _NO_TIME_MS else None


def sweep(
    problem: Problem,
    target: Target,
    default: Schedule,
    bench: Bench,
    ledger: ProblemLedger,
    *,
    inputs: Sequence[str] = (DISTRIBUTIONS[0],),
    should_stop: Callable[[], bool] = lambda: False,
    on_outcome: Callable[[int, int], None] = lambda done, of: None,
) -> dict[Schedule, Outcome]:
    """Times every valid schedule, until it is told to stop; returns the outcomes, in the order of the space.

    Args:
        problem, target: what the schedules are for.
        default: the schedule that all are timed in turns with.
        bench: where they are prepared and timed.
        ledger: has what an earlier, interrupted sweep or search timed, and gets what this one times.
        inputs: the names of the distributions that the bench has.
        should_stop: asked before each candidate.
        on_outcome: called with how many are done, and how many there are.
    """
    outcomes = ledger.known()
    valid = list(SearchSpace.of(problem, target).schedules())
    baseline = measure_default(default, bench, inputs=inputs)
    if default not in outcomes:
        ledger.add(default, baseline.outcome)
        outcomes[default] = baseline.outcome
    for schedule in valid:
        if should_stop():
            break
        if schedule not in outcomes:
            # Each is timed in full, however slow it is, and longer than in a search: a sweep is to be exact everywhere,
            # and the least of many noisy times is less than the best candidate takes.
            outcome = evaluate(schedule, bench, baseline, best_ratio=float("inf"), more_rounds=MORE_ROUNDS)
            ledger.add(schedule, outcome)
            outcomes[schedule] = outcome
        on_outcome(len(outcomes), len(valid))
    return {schedule: outcomes[schedule] for schedule in valid if schedule in outcomes}


class Replay:
    """A sweep made ready for many searches.

    Args:
        sweep: what stands in for the device.
        first: the points that each search begins with, before the sampler is asked.
    """

    def __init__(self, sweep: RecordedSweep, first: Sequence[Point] = ()) -> None:
        self.sweep, self.table = sweep, PointTable(sweep.points)
        self.first = [point for point in first if self.table.find(point) is not None]
        self._first = next(iter(sweep.points[0]))
        if not all(self._first in point for point in sweep.points):
            raise InvalidArgument(f"a point lacks {self._first}; allowed: every point has the first point's first one")
        self._names: dict[Any, dict[str, None]] = {}  # value of the first parameter → the others that go with it
        self._values: dict[str, dict[Any, None]] = {}
        for point in sweep.points:
            names = self._names.setdefault(point[self._first], dict.fromkeys(point))
            if names.keys() != point.keys():
                raise InvalidArgument(
                    f"points with {self._first} = {point[self._first]} have {', '.join(names)}, one has "
                    f"{', '.join(point)}; allowed: the same parameters"
                )
            for name, value in point.items():
                self._values.setdefault(name, {})[value] = None

    def run(self, sampler_name: str, seed: int, evaluations: int) -> list[float]:
        """Runs one search, as `replay` does."""
        if evaluations < 1:
            raise InvalidArgument(f"evaluations = {evaluations} must be at least 1")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=make_sampler(sampler_name, seed=seed, space_points=self.table))
        for point in self.first:
            study.enqueue_trial(dict(point))
        spare = list(range(len(self.table)))
        random.Random(seed).shuffle(spare)
        tried: set[int] = set()
        best: list[float] = []
        least, evaluations = math.inf, min(evaluations, len(self.table))
        while len(best) < evaluations and least > self.sweep.optimum:
            trial, index = self._next(study, tried, spare)
            tried.add(index)
            time = self.sweep.times[index]
            _tell(study, trial, time)
            least = min(least, math.inf if time is None else time)
            best.append(least)
        return best + [least] * (evaluations - len(best))

    def _next(self, study: optuna.Study, tried: set[int], spare: list[int]) -> tuple[optuna.Trial, int]:
        """Returns a trial with a point of the sweep that was not tried, and the index of that point."""
        for idle in itertools.count():
            if idle == _MAX_IDLE_ASKS:
                while spare[-1] in tried:
                    spare.pop()
                study.enqueue_trial(self.table.points[spare[-1]])
            trial = study.ask()
            index = self.table.find(self._suggest(trial))
            if index is not None and index not in tried:
                return trial, index
            _tell(study, trial, None if index is None else self.sweep.times[index])
        raise AssertionError("a point that was enqueued is new")

    def _suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        point = {self._first: trial.suggest_categorical(self._first, list(self._values[self._first]))}
        for name in self._names[point[self._first]]:
            point[name] = trial.suggest_categorical(name, list(self._values[name]))
        return point


def replay(sweep: RecordedSweep, sampler_name: str, seed: int, evaluations: int) -> list[float]:
    """Replays one search; returns the least time after each evaluation, infinite until one succeeds.

    As in a real search, a point that failed costs an evaluation; one that is not in the sweep, or was tried before,
    goes straight back to the sampler at no cost. The search is not played on after it found the optimum.

    Args:
        sweep: what stands in for the device.
        sampler_name: one of `options.SAMPLERS`.
        seed: the seed for the sampler.
        evaluations: how many points are tried; fewer come back where the sweep has fewer points.

    Raises:
        InvalidArgument: there would be fewer than one evaluation, or there is no such sampler.
    """
    return Replay(sweep).run(sampler_name, seed, evaluations)


def first_points(sweep: RecordedSweep) -> list[Point]:
    """Returns what a search begins with on an empty cache: the default of the sweep's problem; none if it has none."""
    if not {"problem", "target"} <= sweep.about.keys():
        return []
    problem, target = from_mapping(Problem, sweep.about["problem"]), from_mapping(Target, sweep.about["target"])
    return [parameters_of(default_schedule(problem, target))]


def _tell(study: optuna.Study, trial: optuna.Trial, time: float | None) -> None:
    study.tell(trial, time, state=TrialState.FAIL if time is None else TrialState.COMPLETE)
