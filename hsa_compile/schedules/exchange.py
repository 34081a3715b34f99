"""Files that carry tuned schedules to another machine: they have a checksum, and only the same version reads them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsa_compile.checks import shown
from hsa_compile.errors import CacheError, InvalidArgument
from hsa_compile.files import read_json, write_whole
from hsa_compile.schedules.ops import source_version
from hsa_compile.schedules.record import TuningRecord
from hsa_compile.schedules.store import DAMAGES, checksum, decode, encode, why
from hsa_compile.versions import installed_versions

FORMAT = "hsa-compile exported schedules"
VERSION = 2  # as in store.py


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """The records that a file held.

    Attributes:
        records: those that this version can use.
        foreign: how many were left out, since they were tuned for kernels of another text.
    """

    records: tuple[TuningRecord, ...]
    foreign: int


def export_records(path: Path, records: Sequence[TuningRecord]) -> None:
    """Writes records to a file, as a whole or not at all.

    Raises:
        CacheError: the file cannot be written.
    """
    body = {
        "format": FORMAT,
        "version": VERSION,
        "hsa-compile": installed_versions()["hsa-compile"],
        "entries": [encode(record) for record in records],
    }
    text = json.dumps({**body, "checksum": checksum(body)}, indent=1, ensure_ascii=False)
    try:
        write_whole(path, (text + "\n").encode())
    except OSError as error:
        raise CacheError(f"cannot write {path}: {error.strerror or error}") from error


def import_records(path: Path) -> Imported:
    """Reads a file that `export_records` wrote.

    Raises:
        InvalidArgument: the file cannot be read, is damaged, or is of another version; the message says which.
    """
    entries = _entries(path)
    try:
        records = [decode(entry) for entry in entries]
    except DAMAGES as error:
        raise InvalidArgument(f"{path} holds an entry that this hsa-compile cannot read ({why(error)})") from error
    usable = tuple(r for r in records if r.kernel_source == source_version(r.problem, r.target))
    return Imported(records=usable, foreign=len(records) - len(usable))


def _entries(path: Path) -> list[Any]:
    content = read_json(path, error=InvalidArgument)
    if content.get("format") != FORMAT:
        raise InvalidArgument(f"{path} is not a file that `hsa-compile schedules export` wrote")
    if content.get("version") != VERSION:
        raise InvalidArgument(f"{path} has format version {shown(content.get('version'))}; this one reads {VERSION}")
    body = {name: value for name, value in content.items() if name != "checksum"}
    if content.get("checksum") != checksum(body):
        raise InvalidArgument(f"{path} is damaged: its checksum does not fit")
    mine = installed_versions()["hsa-compile"]
    if content.get("hsa-compile") != mine:
        raise InvalidArgument(
            f"{path} comes from hsa-compile {shown(content.get('hsa-compile'))}, this is {mine}; schedules move "
            "between equal versions only"
        )
    entries = content.get("entries")
    if not isinstance(entries, list):
        raise InvalidArgument(f"{path} has no list of entries")
    return entries
