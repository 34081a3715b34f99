"""One JSON file of tuning records: read with every damage found, written whole or not at all."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hsa_compile.errors import CacheWarning
from hsa_compile.schedules.key import ScheduleKey
from hsa_compile.schedules.record import TuningRecord

FORMAT = "hsa-compile schedules"
VERSION = 1

Records = dict[ScheduleKey, TuningRecord]


class DamagedFile(ValueError):
    """A file that cannot be used as a whole; the message says why."""


def read_records(path: Path) -> tuple[Records, list[str]]:
    """The records of a file and what is wrong with it, never an exception for its content.

    Returns:
        records of the entries that are whole, and one line for each damage; both empty if there is no file.
    """
    try:
        entries = _read_entries(path)
    except FileNotFoundError:
        return {}, []
    except OSError as error:
        return {}, [f"it cannot be read ({error.strerror})"]
    except DamagedFile as error:
        return {}, [str(error)]
    records: Records = {}
    damages = []
    for number, entry in enumerate(entries, start=1):
        try:
            record = _decode(entry)
        except (DamagedFile, KeyError, TypeError, ValueError, AttributeError) as error:
            damages.append(f"entry {number} of {len(entries)} is damaged ({error})")
        else:
            records[_key_of(record)] = record
    return records, damages


def warn_of_damage(path: Path, damages: list[str]) -> None:
    """One warning a file, however much is wrong with it."""
    more = f" and {len(damages) - 1} more" if len(damages) > 1 else ""
    warnings.warn(f"schedule cache {path}: {damages[0]}{more}; what is damaged is ignored", CacheWarning, stacklevel=3)


def write_records(path: Path, records: Iterable[TuningRecord]) -> None:
    """Replaces the file: written beside it, synced, renamed. The caller holds the lock.

    Raises:
        OSError: the directory cannot be written or the disk is full; the old file is untouched.
    """
    entries = [_encode(record) for record in records]
    text = json.dumps({"format": FORMAT, "version": VERSION, "entries": entries}, indent=1, ensure_ascii=False)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # not every file system lets a directory be synced
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def set_aside(path: Path) -> Path:
    """Copies a damaged file to the first free `NAME.damaged-N`, so that writing over it loses nothing."""
    number = 1
    while (copy := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    if path.is_dir():
        path.rename(copy)
    else:
        shutil.copy2(path, copy)
    return copy


def _read_entries(path: Path) -> list[Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number or a nesting beyond Python's limits
        raise DamagedFile(f"it is no whole JSON file ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DamagedFile(f"it is not a file of format {FORMAT!r}")
    if content.get("version") != VERSION:
        raise DamagedFile(f"it has version {content.get('version')!r}, this hsa-compile reads version {VERSION}")
    if not isinstance(content.get("entries"), list):
        raise DamagedFile("it has no list of entries")
    return content["entries"]


def _encode(record: TuningRecord) -> dict[str, Any]:
    body = {"key": asdict(_key_of(record)), "record": record.to_dict()}
    return {**body, "checksum": _checksum(body)}


def _decode(entry: Any) -> TuningRecord:
    if not isinstance(entry, dict) or set(entry) != {"key", "record", "checksum"}:
        raise DamagedFile("it is not a mapping of key, record and checksum")
    if entry["checksum"] != _checksum({"key": entry["key"], "record": entry["record"]}):
        raise DamagedFile("its checksum does not fit")
    return TuningRecord.from_dict(entry["record"])


def _key_of(record: TuningRecord) -> ScheduleKey:
    return ScheduleKey.of(record.problem, record.target, record.versions)


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]
