"""The file that cuts the pipe in two: tuning puts schedules in, running takes them out."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hsa_compile.errors import CacheError
from hsa_compile.paths import PRETUNED_DIR, chosen_cache_dir, schedule_dir
from hsa_compile.problem import Problem
from hsa_compile.schedules.journal import drop_journal
from hsa_compile.schedules.key import ScheduleKey
from hsa_compile.schedules.record import MEASURED, PREDICTED, TuningRecord
from hsa_compile.schedules.regret import expected_regret
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.schedules.store import Records, add, put_record, read_records, set_aside, warn_of_damage
from hsa_compile.target import Target

LOCK_TIMEOUT_S = 60
_LOCK_POLL_S = 0.005
_MAX_ANSWERS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """A tuned schedule for a problem, and where it comes from.

    Attributes:
        schedule: valid for the problem that was asked for.
        record: the entry that it was taken from.
        origin: `user` or `pretuned`.
        distance: of the entry's key from the problem's; 0 is an exact hit.
        regret: share of time that it is expected to lose against the shape's own winner, 0.03 for 3 %; None where
            nobody measured it: farther than any measured pair of shapes, or from another device. Of a predicted
            entry, against what would be predicted for the shape itself.
    """

    schedule: Schedule
    record: TuningRecord
    origin: str
    distance: float
    regret: float | None

    @property
    def is_predicted(self) -> bool:
        """Whether a model chose the schedule, and no measurement."""
        return self.record.kind == PREDICTED


class ScheduleCache:
    """Tuned schedules: the user's, one file a device, then those that ship with the package.

    All files are read once, at construction; a lookup touches memory only. What another process puts later is
    seen by the next process.

    Args:
        directory: of the user's files; created at the first `put`.
        pretuned: directory of read-only files of the same format.
    """

    def __init__(self, directory: Path, pretuned: Path = PRETUNED_DIR) -> None:
        self.directory = directory
        self.generation = 0  # grows with every change, so that whoever remembers a lookup can forget it
        self._origins: dict[str, Records] = {"user": _read_all(directory), "pretuned": _read_all(pretuned)}
        self._answers: dict[tuple[Problem, Target], Lookup | None] = {}

    def path(self, target: Target) -> Path:
        """The user's file for a device."""
        return self.directory / f"{target.slug}.json"

    def lookup(self, problem: Problem, target: Target) -> Lookup | None:
        """The best entry for a problem: the nearest that was measured, else the nearest that was predicted.

        An exact entry is at distance 0, so it comes first; at equal distance the user's comes before a pretuned
        one. A measured entry comes before any predicted one: what a measurement of a neighbour is worth is known
        (`Lookup.regret`), what the model is worth on a device that was not there is not.

        Returns:
            None if no entry agrees in all fields that must match (`ScheduleKey`) with a valid schedule.
        """
        asked = (problem, target)
        if asked in self._answers:
            return self._answers[asked]
        if len(self._answers) >= _MAX_ANSWERS:  # lengths that never repeat must not grow memory without bound
            self._answers.clear()
        found = self._answers[asked] = self._search(problem, target)
        return found

    def _search(self, problem: Problem, target: Target) -> Lookup | None:
        key = ScheduleKey.of(problem, target)
        legal = [
            (record.kind == PREDICTED, key.distance(other), origin, record)
            for origin, records in self._origins.items()
            for other, record in records.items()
            if not key.mismatches(other)
        ]
        for _, distance, origin, record in sorted(legal, key=lambda item: item[:2]):
            if schedule := usable_schedule(problem, target, record, distance):
                regret = _regret(key, target, record)
                return Lookup(schedule=schedule, record=record, origin=origin, distance=distance, regret=regret)
        return None

    def exact(self, problem: Problem, target: Target, kind: str = MEASURED) -> TuningRecord | None:
        """The user's own entry of a kind for a problem, if there is one whose schedule can still run it."""
        record = self._origins["user"].get(ScheduleKey.of(problem, target))
        usable = record and record.kind == kind and usable_schedule(problem, target, record, 0.0)
        return record if usable else None

    def entries(self) -> Iterator[tuple[str, TuningRecord]]:
        """All entries, as (origin, record)."""
        for origin, records in self._origins.items():
            for record in records.values():
                yield origin, record

    def put(self, record: TuningRecord) -> Path:
        """Stores a record in the user's file of its device, replacing one with the same key.

        A predicted record never replaces a measured one. Two writers lose nothing: the file is changed under its
        lock; a damaged one is copied aside before it is written over.

        Returns:
            the file.

        Raises:
            CacheError: it cannot be locked or written; what was there is untouched.
        """
        path = self.path(record.target)
        with _locked(path):
            put_record(path, record)
        add(self._origins["user"], record)
        self._changed()
        return path

    def clear(self, target: Target | None = None) -> int:
        """Removes the user's files, of one device or all; returns how many entries they held.

        What is damaged in a file is copied aside first.

        Raises:
            CacheError: a file cannot be locked or removed.
        """
        removed = 0
        for path in [self.path(target)] if target else sorted(self.directory.glob("*.json")):
            removed += self._remove(path)
        self._origins["user"] = _read_all(self.directory)
        self._changed()
        return removed

    def explain_miss(self, problem: Problem, target: Target) -> str:
        """Why no entry serves a problem, in one line; for a hit, which entry and how far it is."""
        if found := self.lookup(problem, target):
            how = "exactly" if found.distance == 0 else f"at distance {found.distance:.2f}"
            entry = f"{found.origin} entry ({found.record.kind})"
            return f"served {how} by the {entry} for {found.record.problem.describe()}"
        key = ScheduleKey.of(problem, target)
        best = min((key.mismatches(other) for keys in self._origins.values() for other in keys), key=len, default=None)
        if best is None:
            return "nothing has been tuned yet"
        if not best:
            return "the entries that match have schedules that this problem cannot use"
        return f"the closest entry differs in what must match: {', '.join(best)}"

    def _changed(self) -> None:
        self._answers.clear()
        self.generation += 1

    def _remove(self, path: Path) -> int:
        if not path.exists():
            return 0
        with _locked(path):
            records, damages = read_records(path)
            if damages:
                set_aside(path)
            path.unlink(missing_ok=True)
            drop_journal(path)
        return len(records)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a file's lock, and gives what goes wrong with the file system its name here."""
    # Imported here: filelock pulls in asyncio, and only tuning writes.
    import filelock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_name(f"{path.name}.lock"), timeout=LOCK_TIMEOUT_S, poll_interval=_LOCK_POLL_S):
            yield
    except filelock.Timeout as error:
        raise CacheError(f"schedule cache {path} was locked by another process for {LOCK_TIMEOUT_S} s") from error
    except OSError as error:
        raise CacheError(f"schedule cache {path} cannot be written: {error.strerror or error}") from error


@functools.cache
def _cache_of(chosen: str | None) -> ScheduleCache:
    # By the text of the environment: to make a path of it at every call of an op would take longer than the lookup.
    del chosen
    return ScheduleCache(schedule_dir())


def default_cache() -> ScheduleCache:
    """This process's cache in the user's directory, read at the first call."""
    return _cache_of(chosen_cache_dir())


def tuned_for(problem: Problem, target: Target | None = None) -> Lookup | None:
    """The tuned schedule that a problem would run on here, with where it is from and what it is expected to lose.

    Args:
        problem: what would run.
        target: where; this machine's first GPU, else its CPU, if None.

    Returns:
        None if nothing that was tuned can serve it, and the default schedule would run.
    """
    return default_cache().lookup(problem, target or Target.current())


def usable_schedule(problem: Problem, target: Target, record: TuningRecord, distance: float) -> Schedule | None:
    """A record's schedule as a problem so far away can use it, or None if it cannot."""
    space = SearchSpace.of(problem, target)
    schedule = space.fit(problem, record.schedule) if distance else record.schedule
    return schedule if space.is_valid(problem, schedule, target) else None


def _regret(key: ScheduleKey, target: Target, record: TuningRecord) -> float | None:
    apart = key.distances(ScheduleKey.of_record(record))
    another_device = apart.pop("device", 0.0)  # a prediction is made for an architecture, not for a product
    if another_device and record.kind == MEASURED:
        return None
    return expected_regret(target.kind, sum(apart.values()))


def _read_all(directory: Path) -> Records:
    merged: Records = {}
    for path in sorted(directory.glob("*.json")):
        records, damages = read_records(path)
        if damages:
            warn_of_damage(path, damages)
        for record in records.values():
            add(merged, record)
    return merged
