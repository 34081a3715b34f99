"""A file of tuning records, one for each device: JSON, with a journal beside it.

A file is written as a whole or not at all, and reading it finds each entry that is damaged. A long file is not written
anew at every put: new entries go to its journal, line by line, until the journal is as long as the file, which then
takes them in.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hsa_compile.errors import CacheWarning, warn_user
from hsa_compile.files import end_of_last_line, read_regular, write_whole
from hsa_compile.schedules.key import ScheduleKey
from hsa_compile.schedules.record import MEASURED, PREDICTED, TuningRecord

FORMAT = "hsa-compile schedules"
VERSION = 2  # from 2 on, knobs have the names of today; older files are set aside
JOURNAL_ABOVE = 1 << 18  # a file of more bytes, about a hundred entries, is no longer written anew at every put

Records = dict[ScheduleKey, TuningRecord]


class DamagedFile(ValueError):
    """A file that cannot be used as a whole; the message says why."""


# An entry that is damaged raises one of these when it is read.
DAMAGES = (DamagedFile, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


def journal_path(path: Path) -> Path:
    """Returns the path of a schedule file's journal."""
    return path.with_name(f"{path.name}.journal")


def journal_size(path: Path) -> int:
    """Returns the bytes of a schedule file's journal; 0 if there is none."""
    try:
        return journal_path(path).stat().st_size
    except FileNotFoundError:
        return 0


def read_lines(path: Path) -> list[bytes]:
    """Returns the whole lines of a schedule file's journal; a last one that a killed writer left torn is not one."""
    try:
        content = read_regular(journal_path(path))
    except FileNotFoundError:
        return []
    return content.split(b"\n")[:-1]


def append_line(path: Path, line: bytes) -> None:
    """Adds a line to a schedule file's journal and syncs it. The caller holds the lock.

    Raises:
        OSError: the disk is full or read-only; what was there is untouched.
    """
    handle = os.open(journal_path(path), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        end = end_of_last_line(handle)
        try:
            _write_at(handle, end, line + b"\n")
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, end)
            raise
    finally:
        os.close(handle)


def drop_journal(path: Path) -> None:
    """Removes the journal, once the file itself holds its entries. The caller holds the lock."""
    journal_path(path).unlink(missing_ok=True)


def _write_at(handle: int, offset: int, content: bytes) -> None:
    while content:
        written = os.pwrite(handle, content, offset)
        offset, content = offset + written, content[written:]


def read_records(path: Path) -> tuple[Records, list[str]]:
    """Reads the records of a file and what is wrong with it; its content never raises.

    Returns:
        records of the entries that are whole, and one line for each damage; both empty if there is no file.
    """
    entries: list[Any] = []
    damages: list[str] = []
    records: Records = {}
    # The journal is read first: a writer drops it only after the file holds its entries, so none is missed.
    try:
        lines = read_lines(path)
        entries = _read_entries(path)
    except FileNotFoundError:
        return {}, []
    except OSError as error:
        return {}, [f"it cannot be read ({error.strerror})"]
    except DamagedFile as error:
        damages.append(str(error))
    for number, entry in enumerate(entries, start=1):
        try:
            add(records, decode(entry))
        except DAMAGES as error:
            damages.append(f"entry {number} of {len(entries)} is damaged ({error})")
    for number, line in enumerate(lines, start=1):
        try:
            record = decode(json.loads(line))
            # A writer killed before it dropped the journal leaves lines that are older than the file's entries.
            known = records.get(ScheduleKey.of_record(record))
            if known is None or known.date <= record.date:
                add(records, record)
        except DAMAGES as error:
            damages.append(f"line {number} of {len(lines)} of its journal is damaged ({error})")
    return records, damages


def add(records: Records, record: TuningRecord) -> None:
    """Puts a record in the place of one with the same key; a prediction never replaces a measurement."""
    key = ScheduleKey.of_record(record)
    known = records.get(key)
    if known is None or (record.kind, known.kind) != (PREDICTED, MEASURED):
        # The old key is removed first, so that the recorded fields of the key are those of the new record.
        records.pop(key, None)
        records[key] = record


def put_record(path: Path, record: TuningRecord) -> None:
    """Adds a record to a file. The caller holds the lock.

    A damaged file is copied aside before it is written over.

    Raises:
        OSError: the directory cannot be written or the disk is full; what was there is untouched.
    """
    size = path.stat().st_size if path.is_file() else 0
    if size > JOURNAL_ABOVE and journal_size(path) < size:
        append_line(path, json.dumps(encode(record), ensure_ascii=False).encode())
        return
    records, damages = read_records(path)
    if damages:
        set_aside(path)
    add(records, record)
    write_records(path, records.values())


def warn_of_damage(path: Path, damages: list[str]) -> None:
    """Gives one warning for a file, however much is wrong with it."""
    more = f" and {len(damages) - 1} more" if len(damages) > 1 else ""
    warn_user(f"schedule cache {path}: {damages[0]}{more}; what is damaged is ignored", CacheWarning)


def write_records(path: Path, records: Iterable[TuningRecord]) -> None:
    """Replaces the file and its journal. The caller holds the lock.

    Raises:
        OSError: the directory cannot be written or the disk is full; the old file is untouched.
    """
    entries = [encode(record) for record in records]
    text = json.dumps({"format": FORMAT, "version": VERSION, "entries": entries}, indent=1, ensure_ascii=False)
    write_whole(path, (text + "\n").encode())
    drop_journal(path)


def set_aside(path: Path) -> Path:
    """Copies a damaged file and its journal to the first free `NAME.damaged-N`, so that writing loses nothing."""
    number = 1
    while (copy := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    if path.is_dir():
        path.rename(copy)
    else:
        shutil.copy2(path, copy)
    if journal_size(path):
        shutil.copy2(journal_path(path), journal_path(copy))
    return copy


def _read_entries(path: Path) -> list[Any]:
    try:
        content = json.loads(read_regular(path))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number or a nesting beyond Python's limits
        raise DamagedFile(f"it is no whole JSON file ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DamagedFile(f"it is not a file of format {FORMAT!r}")
    if content.get("version") != VERSION:
        raise DamagedFile(f"it has version {content.get('version')!r}, this hsa-compile reads version {VERSION}")
    if not isinstance(content.get("entries"), list):
        raise DamagedFile("it has no list of entries")
    return content["entries"]


def encode(record: TuningRecord) -> dict[str, Any]:
    """Returns a record as an entry of a file: the key in clear, the record, and a checksum of both."""
    body = {"key": asdict(ScheduleKey.of_record(record)), "record": record.to_dict()}
    return {**body, "checksum": checksum(body)}


def decode(entry: Any) -> TuningRecord:
    """Returns the record that an entry holds.

    Raises:
        one of `DAMAGES`: the entry is not what `encode` made.
    """
    if not isinstance(entry, dict) or set(entry) != {"key", "record", "checksum"}:
        raise DamagedFile("it is not a mapping of key, record and checksum")
    if entry["checksum"] != checksum({"key": entry["key"], "record": entry["record"]}):
        raise DamagedFile("its checksum does not fit")
    return TuningRecord.from_dict(entry["record"])


def checksum(body: Any) -> str:
    """Returns 16 hex digits of the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]
