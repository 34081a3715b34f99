"""The cache of tuned schedules: tuning puts them in, running takes them out."""

import contextlib
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hsa_compile.errors import CacheError
from hsa_compile.paths import PRETUNED_DIR, chosen_cache_dir, make_cache_dir, schedule_dir
from hsa_compile.problem import Problem
from hsa_compile.schedules.key import ScheduleKey
from hsa_compile.schedules.lookup import Candidate, Lookup, candidates, use
from hsa_compile.schedules.record import MEASURED, TuningRecord
from hsa_compile.schedules.store import (
    MOST_BYTES,
    Records,
    add,
    drop_journal,
    outranks,
    put_record,
    read_records,
    set_aside,
    size_of,
    warn_of_damage,
    write_records,
)
from hsa_compile.target import Target

LOCK_TIMEOUT_S = 60
_LOCK_POLL_S = 0.005
_MAX_ANSWERS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """How many of the records merged into a cache were new, replaced a worse entry, or were left out."""

    added: int = 0
    replaced: int = 0
    kept: int = 0


class ScheduleCache:
    """The tuned schedules of the user, one file a device, and those that ship with the package.

    All files are read once, at construction; a lookup touches memory only. What another process puts later is
    seen by the next process.

    Args:
        directory: where the user's files are; it is created at the first `put`.
        pretuned: a directory of read-only files of the same format; those that ship with the package if None.
    """

    def __init__(self, directory: Path, pretuned: Path | None = None) -> None:
        self.directory = directory
        self.generation = 0  # grows with every change, so that whoever remembers a lookup can forget it
        self._origins: dict[str, Records] = {
            "user": _read_all(directory),
            "pretuned": _read_all(pretuned or PRETUNED_DIR),
        }
        self._answers: dict[tuple[Problem, Target], Lookup | None] = {}

    def path(self, target: Target) -> Path:
        """Returns the path of the user's file for a device."""
        return self.directory / f"{target.slug}.json"

    def lookup(self, problem: Problem, target: Target) -> Lookup | None:
        """Returns the best entry for a problem: the nearest that was measured, else the nearest that was predicted.

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
        answers = (use(problem, target, candidate) for candidate in self.candidates(problem, target, serving=True))
        found = self._answers[asked] = next((answer for answer in answers if answer), None)
        return found

    def candidates(self, problem: Problem, target: Target, *, serving: bool = False) -> list[Candidate]:
        """Returns all entries compared with a problem, best first; if `serving`, only those that may serve it."""
        entries = (
            (origin, key, record) for origin, records in self._origins.items() for key, record in records.items()
        )
        return candidates(problem, target, entries, serving=serving)

    def exact(self, problem: Problem, target: Target, kind: str = MEASURED) -> TuningRecord | None:
        """Returns the user's own entry of a kind for a problem, if there is one whose schedule can still run it."""
        record = self._origins["user"].get(ScheduleKey.of(problem, target))
        if record is None or record.kind != kind:
            return None
        candidate = Candidate(record=record, origin="user", mismatches=(), distances={})
        return record if use(problem, target, candidate) else None

    def finished(self, problem: Problem, target: Target) -> TuningRecord | None:
        """Returns the measured entry that a complete search left; None if the search has to begin or go on."""
        record = self.exact(problem, target)
        return record if record is not None and record.complete else None

    def entries(self) -> Iterator[tuple[str, TuningRecord]]:
        """Yields all entries, as (origin, record)."""
        for origin, records in self._origins.items():
            for record in records.values():
                yield origin, record

    def put(self, record: TuningRecord) -> Path:
        """Stores a record in the user's file of its device, replacing one with the same key.

        A predicted record never replaces a measured one, and one of half a search none of a whole one. Two writers
        lose nothing: the file is changed under its lock; a damaged one is copied aside before it is written over.

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

    def merge(self, records: Iterable[TuningRecord]) -> Merged:
        """Stores records that came from elsewhere, each only if it is better than the user's entry of the same key.

        A measured record is better than a predicted one, and one of a whole search than one of half a search; among
        equals, the later one is better.

        Raises:
            CacheError: a file cannot be locked or written; the files of other devices may have been.
        """
        added = replaced = kept = 0
        files: dict[Path, list[TuningRecord]] = {}
        for record in records:
            files.setdefault(self.path(record.target), []).append(record)
        for path, incoming in files.items():
            with _locked(path):
                known, damages = read_records(path)
                if damages:
                    set_aside(path)
                for record in incoming:
                    mine = known.get(ScheduleKey.of_record(record))
                    if mine and (outranks(mine, record) or (mine.date >= record.date and not outranks(record, mine))):
                        kept += 1
                        continue
                    added, replaced = (added, replaced + 1) if mine else (added + 1, replaced)
                    add(known, record)
                write_records(path, known.values())
        self._origins["user"] = _read_all(self.directory)
        self._changed()
        return Merged(added=added, replaced=replaced, kept=kept)

    def remove(self, record: TuningRecord) -> None:
        """Removes the user's entry that has a record's key; a damaged file is copied aside first.

        Raises:
            CacheError: the file cannot be locked or written; what was there is untouched.
        """
        path = self.path(record.target)
        with _locked(path):
            records, damages = read_records(path)
            if records.pop(ScheduleKey.of_record(record), None) is not None:
                if damages:
                    set_aside(path)
                write_records(path, records.values())
        self._origins["user"].pop(ScheduleKey.of_record(record), None)
        self._changed()

    def clear(self, target: Target | None = None) -> int:
        """Removes the user's file of one device, or all of them, and returns how many entries they held.

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
        """Returns one line that says which entry serves a problem, and how far it is, or why none does."""
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
    """Holds a file's lock; what goes wrong with the lock or the file system raises CacheError."""
    # Imported here: filelock pulls in asyncio, and only tuning writes.
    import filelock

    try:
        make_cache_dir(path.parent)
        with filelock.FileLock(path.with_name(f"{path.name}.lock"), timeout=LOCK_TIMEOUT_S, poll_interval=_LOCK_POLL_S):
            yield
    except filelock.Timeout as error:
        raise CacheError(f"schedule cache {path} was locked by another process for {LOCK_TIMEOUT_S} s") from error
    except OSError as error:
        raise CacheError(f"schedule cache {path} cannot be written: {error.strerror or error}") from error


@functools.cache
def _cache_of(chosen: str | None) -> ScheduleCache:
    # The key is the text of the environment: to make a path of it at every call of an op would take longer than the
    # lookup.
    del chosen
    return ScheduleCache(schedule_dir())


def default_cache() -> ScheduleCache:
    """Returns this process's cache in the user's directory; its files are read at the first call."""
    return _cache_of(chosen_cache_dir())


def tuned_for(problem: Problem, target: Target | None = None) -> Lookup | None:
    """Returns the tuned schedule that a problem would run on, with where it is from and what it is expected to lose.

    Args:
        problem: what would run.
        target: the device that it would run on; this machine's first GPU, else its CPU, if None.

    Returns:
        the lookup, or None if no tuned schedule can serve the problem and the default one would run.
    """
    return default_cache().lookup(problem, target or Target.current())


def _read_all(directory: Path) -> Records:
    merged: Records = {}
    for path in _small_enough(directory):
        records, damages = read_records(path)
        if damages:
            warn_of_damage(path, damages)
        for record in records.values():
            add(merged, record)
    return merged


def _small_enough(directory: Path) -> list[Path]:
    """Returns the schedule files of a directory, in order, but for the longest where all together have too many bytes.

    To read them takes the first call of an op a second for each 6 MB.
    """
    total, chosen = 0, []
    sizes = {path: size_of(path) for path in sorted(directory.glob("*.json"))}
    for path in sorted(sizes, key=lambda path: sizes[path]):
        total += sizes[path]
        if total > MOST_BYTES:
            warn_of_damage(path, [f"with it, the files of {directory} have more than {MOST_BYTES} bytes"])
        else:
            chosen.append(path)
    return sorted(chosen)
