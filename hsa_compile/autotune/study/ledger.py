"""The ledger: a file that keeps every timing of every candidate, so that a later search times only what is new."""

import json
import zlib
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import filelock

from hsa_compile.autotune.evaluate import Outcome
from hsa_compile.errors import StorageError, may_pass
from hsa_compile.files import append_line, parse_json, read_lines
from hsa_compile.kernels.emit import emit
from hsa_compile.paths import make_cache_dir, schedule_dir
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.target import Target
from hsa_compile.versions import installed_versions


def default_ledger(target: Target) -> Path:
    """Returns the path of a device's ledger, beside its studies."""
    return schedule_dir() / "studies" / f"{target.slug}.ledger.jsonl"


class Ledger:
    """An append-only file of the outcomes of many problems, one JSON line each.

    A line's key is the problem, target, inputs, candidate, default, both sources' fingerprints and the versions of
    what compiled them: nothing that changes when the search space grows. A line counts only if its checksum fits;
    one that was torn by a crash is passed over, and the next takes its place.

    Args:
        path: where the file is; it is made at the first `add`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, key: Mapping[str, Any], outcome: Outcome) -> None:
        """Appends an outcome and syncs the file.

        Raises:
            StorageError: the file cannot be written.
        """
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        body = {"key": dict(key), "outcome": outcome.to_dict(), "date": date}
        line = json.dumps({**body, "checksum": _checksum(body)}, separators=(",", ":")).encode()
        try:
            make_cache_dir(self.path.parent)
            with filelock.FileLock(f"{self.path}.lock"):
                append_line(self.path, line)
        except OSError as error:
            raise StorageError(f"ledger {self.path} cannot be written: {error.strerror or error}") from error

    def lines(self) -> Iterator[tuple[dict[str, Any], Outcome]]:
        """Yields (key, outcome) of each whole line, oldest first.

        Raises:
            StorageError: what is there cannot be read, or is no file.
        """
        try:
            for line in read_lines(self.path):
                # A last line without its end is what a killed writer left: the next line takes its place.
                if line.endswith(b"\n") and (found := _read(line)) is not None:
                    yield found
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(f"ledger {self.path} cannot be read: {error.strerror or error}") from error


class ProblemLedger:
    """A ledger as the search of one problem sees it.

    Args:
        ledger: the file that the lines are in.
        problem, target, inputs: what the lines are about.
        default: the schedule that all are timed against.
    """

    def __init__(self, ledger: Ledger, problem: Problem, target: Target, inputs: str, default: Schedule) -> None:
        self._ledger, self._problem, self._target = ledger, problem, target
        versions = {name: version for name, version in installed_versions().items() if name != "optuna"}
        self._common = {
            "problem": problem.to_dict(),
            "target": target.to_dict(),
            "inputs": inputs,
            "default": dict(default),
            "default_fingerprint": emit(problem, default, target).fingerprint,
            "versions": versions,
        }

    def add(self, schedule: Schedule, outcome: Outcome) -> None:
        """Appends what became of a candidate."""
        self._ledger.add(self._key(schedule), outcome)

    def known(self) -> dict[Schedule, Outcome]:
        """Returns the latest outcome of each candidate that is valid now and whose source is still the same.

        Failures that another day may not repeat are left out: what was known before them still is.
        """
        space = SearchSpace.of(self._problem, self._target)
        found: dict[Schedule, tuple[dict[str, Any], Outcome]] = {}
        for key, outcome in self._ledger.lines():
            if not may_pass(outcome.failure) and all(key.get(name) == value for name, value in self._common.items()):
                schedule = Schedule.from_dict(key["schedule"])
                found[schedule] = key, outcome
        return {
            schedule: outcome
            for schedule, (key, outcome) in found.items()
            if space.is_valid(schedule) and key == self._key(schedule)
        }

    def _key(self, schedule: Schedule) -> dict[str, Any]:
        fingerprint = emit(self._problem, schedule, self._target).fingerprint
        return {**self._common, "schedule": dict(schedule), "fingerprint": fingerprint}


def _read(line: bytes) -> tuple[dict[str, Any], Outcome] | None:
    """Returns a line's (key, outcome); None if it is torn or has another format."""
    try:
        body = parse_json(line)
        checksum = body.pop("checksum")
        if checksum != _checksum(body):
            return None
        Schedule.from_dict(body["key"]["schedule"])
        return body["key"], Outcome.from_dict(body["outcome"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _checksum(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
