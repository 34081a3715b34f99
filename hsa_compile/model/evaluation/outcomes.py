"""What was found, sample by sample, in a file that a kill cannot damage: nothing in it is ever computed twice."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock

from hsa_compile.errors import HSACompileWarning, SaveError, warn_user
from hsa_compile.files import make_directory, parse_json, read_regular

OUTCOMES_FILE = "samples.jsonl"
_LOCK = ".samples.lock"
_KINDS: tuple[dict[str, type], ...] = (  # retrieval, perplexity, and the two kinds of request of the harness
    {"correct": bool},
    {"correct": bool, "start": int, "end": int},
    {"loss": float, "bytes": int},
    {"log_probability": float, "is_greedy": bool},
    {"text": str},
)

_MOST_LOSS = 700.0  # a byte; e to the power of more is no float

Key = Mapping[str, Any]
Values = dict[str, Any]


class OutcomeFile:
    """Lines of `{"key": …, "values": …}` in a folder, held by one process at a time; a context manager.

    Attributes:
        known: what was found so far, by key.

    Args:
        directory: the folder of the file; it is made if it is not there. None for a process that writes nothing, since
            another one that evaluates with it does.

    Raises:
        SaveError: another process writes to the file, or it cannot be read or written.
    """

    def __init__(self, directory: Path | None) -> None:
        self.known: dict[str, Values] = {}
        self._writes = directory is not None
        if directory is not None:
            make_directory(directory)
            self.path = directory / OUTCOMES_FILE
            self._lock = filelock.FileLock(directory / _LOCK)

    def __enter__(self) -> "OutcomeFile":
        if not self._writes:
            return self
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise SaveError(
                f"another process evaluates into {self.path.parent}; wait for it or name another folder"
            ) from error
        except OSError as error:
            raise SaveError(f"{self.path.parent} cannot be written: {error.strerror}") from error
        try:
            self._read()
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            self._lock.release()
            raise SaveError(f"{self.path} cannot be opened: {error.strerror}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writes:
            os.close(self._file)
            self._lock.release()

    def __len__(self) -> int:
        return len(self.known)

    def get(self, key: Key) -> Values | None:
        """Returns what was found for a sample, or None."""
        return self.known.get(_text(key))

    def add(self, found: Iterable[tuple[Key, Values]]) -> None:
        """Adds samples; when this returns, the disk has them.

        Raises:
            SaveError: the file cannot be written; what was added before stays.
        """
        lines = ""
        added: dict[str, Values] = {}
        for key, values in found:
            added[_text(key)] = values
            lines += json.dumps({"key": dict(key), "values": values}, ensure_ascii=False) + "\n"
        data = memoryview(lines.encode() if self._writes else b"")
        try:
            while data:
                data = data[os.write(self._file, data) :]
            if self._writes:
                os.fsync(self._file)
        except OSError as error:
            raise SaveError(f"{self.path} cannot be written: {error.strerror}; what was finished is kept") from error
        self.known |= added

    def _read(self) -> None:
        """Reads all whole lines; a line that a dying process left unfinished is cut off."""
        data = read_regular(self.path) if self.path.exists() else b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            warn_user(f"{self.path} ended in the middle of a line; that sample is computed again", HSACompileWarning)
            os.truncate(self.path, whole)
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                record = parse_json(line)
                self.known[_text(record["key"])] = _checked(record["values"])
            except (ValueError, TypeError, KeyError):
                warn_user(f"{self.path} is damaged in line {number}; that sample is computed again", HSACompileWarning)


def _text(key: Key) -> str:
    return json.dumps(dict(key), sort_keys=True, ensure_ascii=False)


def _checked(values: Any) -> Values:
    """Returns values as an evaluation writes them; raises ValueError for all else."""
    if not isinstance(values, dict) or {name: type(value) for name, value in values.items()} not in _KINDS:
        raise ValueError("values of another kind")
    if not all(math.isfinite(value) for value in values.values() if isinstance(value, float)):
        raise ValueError("a number that is not finite")
    if "loss" in values and not 0 <= values["loss"] <= _MOST_LOSS * min(max(1, values["bytes"]), 2**53):
        raise ValueError("a loss that no text has")
    return values
