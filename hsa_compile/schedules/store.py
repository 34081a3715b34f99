"""A file of tuning records, one for each device: JSON, with a journal beside it.

A file is written as a whole or not at all, and reading it finds each entry that is damaged. A long file is not written
anew at every put: new entries go to its journal, line by line, until the journal is as long as the file, which then
takes them in. Each time it is written anew its generation grows by one; a line of the journal names the generation that
it follows, so that nobody needs a clock to tell whether the file holds it already.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hsa_compile.checks import MAX_TEXT, shown
from hsa_compile.errors import CacheWarning, warn_user
from hsa_compile.files import append_line, parse_json, read_regular, write_whole
from hsa_compile.schedules.key import ScheduleKey
from hsa_compile.schedules.record import MEASURED, TuningRecord
from hsa_compile.schedules.space import SearchSpace

FORMAT = "hsa-compile schedules"
VERSION = 2  # from 2 on, knobs have the names of today; older files are set aside
JOURNAL_ABOVE = 1 << 18  # a file of more bytes, about a hundred entries, is no longer written anew at every put
MOST_BYTES = 1 << 24  # more, which is 6,000 entries, would keep the first call of an op waiting for seconds
_GENERATION = re.compile(rb'"generation": (\d{1,15})')
_HEAD_BYTES = 200  # what stands before the entries of a file fits in so many

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
    return _size(journal_path(path))


def size_of(path: Path) -> int:
    """Returns the bytes of a schedule file and its journal."""
    return _size(path) + journal_size(path)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # there is none, or a link leads nowhere
        return 0


def read_lines(path: Path) -> list[bytes]:
    """Returns the whole lines of a schedule file's journal; a last one that a killed writer left torn is not one."""
    try:
        content = read_regular(journal_path(path), MOST_BYTES)
    except FileNotFoundError:
        return []
    return content.split(b"\n")[:-1]


def drop_journal(path: Path) -> None:
    """Removes the journal, once the file itself holds its entries. The caller holds the lock."""
    journal_path(path).unlink(missing_ok=True)


def read_records(path: Path) -> tuple[Records, list[str]]:
    """Reads the records of a file and what is wrong with it; its content never raises.

    Returns:
        records of the entries that are whole, and one line for each damage; both empty if there is no file.
    """
    content, entries, lines = b"", list[Any](), list[bytes]()
    damages: list[str] = []
    records: Records = {}
    # The journal is read first: a writer drops it only after the file holds its entries, so none is missed.
    try:
        lines = read_lines(path)
    except OSError as error:
        damages.append(f"its journal cannot be read ({error.strerror or error})")
    try:
        content = read_regular(path, MOST_BYTES)
        entries = _entries(content)
    except FileNotFoundError:
        return {}, []
    except OSError as error:
        return {}, [f"it cannot be read ({error.strerror or error})", *damages]
    except DamagedFile as error:
        damages.append(str(error))
    for number, entry in enumerate(entries, start=1):
        try:
            add(records, decode(entry))
        except DAMAGES as error:
            damages.append(f"entry {number} of {len(entries)} is damaged ({why(error)})")
    generation = _generation(content)
    for number, line in enumerate(lines, start=1):
        try:
            entry = parse_json(line)
            record = decode(entry)
            # A writer that was killed before it dropped the journal leaves lines that the file holds already.
            if entry.get("generation", generation) >= generation:
                add(records, record)
        except DAMAGES as error:
            damages.append(f"line {number} of {len(lines)} of its journal is damaged ({why(error)})")
    return records, damages


def why(error: Exception) -> str:
    """Returns the text of an error that a file's content raised; KeyError's and TypeError's may hold any text of it."""
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return text if text.isprintable() and len(text) < MAX_TEXT else shown(text)


def add(records: Records, record: TuningRecord) -> None:
    """Puts a record in the place of one with the same key, unless that one stays (`outranks`)."""
    key = ScheduleKey.of_record(record)
    known = records.get(key)
    if known is None or not outranks(known, record):
        # The old key is removed first, so that the recorded fields of the key are those of the new record.
        records.pop(key, None)
        records[key] = record


def outranks(known: TuningRecord, record: TuningRecord) -> bool:
    """Returns whether a record with the same key stays whatever their dates are.

    A prediction never replaces a measurement, and half a search none that is finished and can still be used.
    """
    if known.kind != record.kind:
        return known.kind == MEASURED
    if (known.complete, record.complete) != (True, False):
        return False
    return SearchSpace.of(known.problem, known.target).is_valid(known.schedule)


def put_record(path: Path, record: TuningRecord) -> None:
    """Adds a record to a file. The caller holds the lock.

    A damaged file is copied aside before it is written over.

    Raises:
        OSError: the directory cannot be written, the disk is full, or the file; what was there is untouched.
    """
    size = path.stat().st_size if path.is_file() else 0
    # The file and its journal together stay below what is read.
    if size > JOURNAL_ABOVE and journal_size(path) < min(size, MOST_BYTES - size - JOURNAL_ABOVE):
        entry = encode(record, generation=_generation_of(path))
        append_line(journal_path(path), json.dumps(entry, ensure_ascii=False).encode())
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
    head = {"format": FORMAT, "version": VERSION, "generation": _generation_of(path) + 1}
    entries = [encode(record) for record in records]
    text = (json.dumps({**head, "entries": entries}, indent=1, ensure_ascii=False) + "\n").encode()
    if len(text) > MOST_BYTES:
        raise OSError(errno.EFBIG, f"it would have {len(text)} bytes, more than {MOST_BYTES}: export and clear it")
    write_whole(path, text)
    drop_journal(path)


def _generation_of(path: Path) -> int:
    """Returns how often a file was written anew; 0 if it is not there or does not say so."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return _generation(file.read(_HEAD_BYTES))


def _generation(content: bytes) -> int:
    found = _GENERATION.search(content[:_HEAD_BYTES])
    return int(found.group(1)) if found else 0


def set_aside(path: Path) -> Path:
    """Copies a damaged file and its journal to the first free `NAME.damaged-N`, so that writing loses nothing."""
    number = 1
    while (copy := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    for file, place in ((path, copy), (journal_path(path), journal_path(copy))):
        if file.is_file() and _size(file) <= MOST_BYTES:
            shutil.copy2(file, place)
        elif os.path.lexists(file):  # a directory, a pipe, a link to nowhere, a terabyte
            file.rename(place)
    return copy


def _entries(text: bytes) -> list[Any]:
    try:
        content = parse_json(text)
    except ValueError as error:
        raise DamagedFile(f"it is no whole JSON file ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DamagedFile(f"it is not a file of format {FORMAT!r}")
    if content.get("version") != VERSION:
        raise DamagedFile(f"it has version {shown(content.get('version'))}, this hsa-compile reads version {VERSION}")
    if not isinstance(content.get("entries"), list):
        raise DamagedFile("it has no list of entries")
    return content["entries"]


def encode(record: TuningRecord, **more: int) -> dict[str, Any]:
    """Returns a record as an entry of a file: the key in clear, the record, what `more` there is, a checksum."""
    body = {"key": asdict(ScheduleKey.of_record(record)), "record": record.to_dict(), **more}
    return {**body, "checksum": checksum(body)}


def decode(entry: Any) -> TuningRecord:
    """Returns the record that an entry holds.

    Raises:
        one of `DAMAGES`: the entry is not what `encode` made.
    """
    if not isinstance(entry, dict) or set(entry) - {"generation"} != {"key", "record", "checksum"}:
        raise DamagedFile("it is not a mapping of key, record and checksum")
    if entry["checksum"] != checksum({name: value for name, value in entry.items() if name != "checksum"}):
        raise DamagedFile("its checksum does not fit")
    return TuningRecord.from_dict(entry["record"])


def checksum(body: Any) -> str:
    """Returns 16 hex digits of the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]
