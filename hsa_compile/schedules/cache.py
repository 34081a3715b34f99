"""The file that cuts the pipe in two: tuning puts schedules in, running takes them out."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hsa_compile.errors import CacheError
from hsa_compile.paths import PRETUNED_DIR, schedule_dir
from hsa_compile.problem import Problem
from hsa_compile.schedules.key import ScheduleKey
from hsa_compile.schedules.record import TuningRecord
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.schedules.store import Records, read_records, set_aside, warn_of_damage, write_records
from hsa_compile.target import Target

LOCK_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """A tuned schedule for a problem, and where it comes from.

    Attributes:
        schedule: valid for the problem that was asked for.
        record: the entry that it was taken from.
        origin: `user` or `pretuned`.
        distance: of the entry's key from the problem's; 0 is an exact hit.
    """

    schedule: Schedule
    record: TuningRecord
    origin: str
    distance: float


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

    def path(self, target: Target) -> Path:
        """The user's file for a device."""
        return self.directory / f"{target.slug}.json"

    def lookup(self, problem: Problem, target: Target) -> Lookup | None:
        """The best entry for a problem: exact by the user, exact pretuned, then the nearest tuned shape.

        Returns:
            None if no entry agrees in all fields that must match (`ScheduleKey`) with a valid schedule.
        """
        key = ScheduleKey.of(problem, target)
        for origin, records in self._origins.items():
            if (record := records.get(key)) and (found := _use(problem, target, record, origin, 0.0)):
                return found
        near = [
            (key.distance(other), origin, record)
            for origin, records in self._origins.items()
            for other, record in records.items()
            if not key.mismatches(other)
        ]
        for distance, origin, record in sorted(near, key=lambda item: item[0]):
            if found := _use(problem, target, record, origin, distance):
                return found
        return None

    def exact(self, problem: Problem, target: Target) -> TuningRecord | None:
        """The user's own entry for a problem, if there is one whose schedule can still run it."""
        record = self._origins["user"].get(ScheduleKey.of(problem, target))
        return record if record and _use(problem, target, record, "user", 0.0) else None

    def entries(self) -> Iterator[tuple[str, TuningRecord]]:
        """All entries, as (origin, record)."""
        for origin, records in self._origins.items():
            for record in records.values():
                yield origin, record

    def put(self, record: TuningRecord) -> Path:
        """Stores a record in the user's file of its device, replacing one with the same key.

        The file is read again under its lock, so that two writers lose nothing; a damaged file is copied aside
        before it is written over.

        Returns:
            the file.

        Raises:
            CacheError: it cannot be locked or written; what was there is untouched.
        """
        path = self.path(record.target)
        self._update(path, lambda records: {**records, _key(record): record})
        self._origins["user"][_key(record)] = record
        self.generation += 1
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
        self.generation += 1
        return removed

    def explain_miss(self, problem: Problem, target: Target) -> str:
        """Why no entry serves a problem, in one line; for a hit, which entry and how far it is."""
        if found := self.lookup(problem, target):
            how = "exactly" if found.distance == 0 else f"at distance {found.distance:.2f}"
            return f"served {how} by the {found.origin} entry for {found.record.problem.describe()}"
        key = ScheduleKey.of(problem, target)
        best = min((key.mismatches(_key(record)) for _, record in self.entries()), key=len, default=None)
        if best is None:
            return "nothing has been tuned yet"
        if not best:
            return "the entries that match have schedules that this problem cannot use"
        return f"the closest entry differs in what must match: {', '.join(best)}"

    def _update(self, path: Path, change: Callable[[Records], Records]) -> None:
        with _locked(path):
            records, damages = read_records(path)
            if damages:
                set_aside(path)
            write_records(path, change(records).values())

    def _remove(self, path: Path) -> int:
        if not path.exists():
            return 0
        with _locked(path):
            records, damages = read_records(path)
            if damages:
                set_aside(path)
            path.unlink(missing_ok=True)
        return len(records)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a file's lock, and gives what goes wrong with the file system its name here."""
    # Imported here: filelock pulls in asyncio, and only tuning writes.
    import filelock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_name(f"{path.name}.lock"), timeout=LOCK_TIMEOUT_S):
            yield
    except filelock.Timeout as error:
        raise CacheError(f"schedule cache {path} was locked by another process for {LOCK_TIMEOUT_S} s") from error
    except OSError as error:
        raise CacheError(f"schedule cache {path} cannot be written: {error.strerror or error}") from error


@functools.cache
def _cache_in(directory: Path) -> ScheduleCache:
    return ScheduleCache(directory)


def default_cache() -> ScheduleCache:
    """This process's cache in the user's directory, read at the first call."""
    return _cache_in(schedule_dir())


def _key(record: TuningRecord) -> ScheduleKey:
    return ScheduleKey.of(record.problem, record.target, record.versions)


def _read_all(directory: Path) -> Records:
    merged: Records = {}
    for path in sorted(directory.glob("*.json")):
        records, damages = read_records(path)
        if damages:
            warn_of_damage(path, damages)
        merged.update(records)
    return merged


def _use(problem: Problem, target: Target, record: TuningRecord, origin: str, distance: float) -> Lookup | None:
    space = SearchSpace.of(problem, target)
    schedule = space.fit(problem, record.schedule) if distance else record.schedule
    if not space.is_valid(problem, schedule, target):
        return None
    return Lookup(schedule=schedule, record=record, origin=origin, distance=distance)
