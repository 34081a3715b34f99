"""What an unfinished preparation has finished: one line a source, each with the sizes and CRCs that prove it.

A line counts only if all files hold what it claims, so that neither a killed process nor a power cut can make a
half-written source look whole.
"""

import json
import os
import zlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hsa_compile.checks import check_count, check_number, check_text, from_mapping, shown
from hsa_compile.errors import CorpusError, InvalidArgument
from hsa_compile.files import parse_json, read_regular
from hsa_compile.model.data.documents import Source

_READ_BLOCK = 4 * 2**20
MOST = 2**62  # more bytes, documents or tokens than there are
_BLOCK = 4 * 2**20


class AppendFile:
    """A file that only grows, written in large blocks.

    Args:
        path: the file; it is created if it is not there.
        size: the size that it is cut to at first; what lies beyond was half written by a process that died.

    Raises:
        CorpusError: the file cannot be written; any call may raise it. The message names the file and the reason.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self.path = path
        self.size = self._start = size
        self.crc = 0  # the CRC of what was appended since the last `mark`
        self._pending = bytearray()
        try:
            self._handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            os.ftruncate(self._handle, size)
            os.lseek(self._handle, size, os.SEEK_SET)
        except OSError as error:
            raise _cannot_write(path, error) from error

    def append(self, data: bytes | memoryview) -> None:
        """Adds bytes; they reach the file at the latest with the next `flush`."""
        self._pending += data
        self.crc = zlib.crc32(data, self.crc)
        self.size += len(data)
        if len(self._pending) >= _READ_BLOCK:
            self.flush()

    def flush(self) -> None:
        """Hands everything to the operating system: it survives this process, though not a power cut."""
        view = memoryview(self._pending)
        try:
            while view:
                view = view[os.write(self._handle, view) :]
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        finally:
            view.release()
        self._pending.clear()

    def mark(self) -> None:
        """Flushes; `rollback` returns to this place, and the CRC begins anew here."""
        self.flush()
        self._start, self.crc = self.size, 0

    def rollback(self) -> None:
        """Forgets what was appended since the last `mark`."""
        self._pending.clear()
        try:
            os.ftruncate(self._handle, self._start)
            os.lseek(self._handle, self._start, os.SEEK_SET)
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self.size, self.crc = self._start, 0

    def sync(self) -> None:
        """Flushes, and waits until the disk has it."""
        self.flush()
        try:
            os.fsync(self._handle)
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def close(self) -> None:
        """Closes without flushing; what was not marked counts for nothing."""
        os.close(self._handle)


def _cannot_write(path: Path, error: OSError) -> CorpusError:
    return CorpusError(
        f"cannot write {path}: {error.strerror}; what was finished is kept, and the same command goes on from there"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One source that was read to its end, or found unusable.

    Attributes:
        source: the source, as it was listed when it was read.
        documents: how many documents were kept.
        duplicates: how many documents equal an earlier one byte by byte.
        skipped: how many parts were left out, by reason.
        examples: the first of them, as (where, reason).
        sizes: the size of each file of the corpus afterwards.
        crcs: the CRC of what the source added to each file.
    """

    source: Source
    documents: int
    duplicates: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    examples: tuple[tuple[str, str], ...] = ()
    sizes: dict[str, int]
    crcs: dict[str, int]

    def __post_init__(self) -> None:
        check_found(self.documents, self.duplicates, self.skipped, self.examples)
        for name, values, most in (("sizes", self.sizes, MOST), ("crcs", self.crcs, 2**32 - 1)):
            _check_counts(name, values, most)


def check_found(documents: object, duplicates: object, skipped: object, examples: object) -> None:
    """Raises InvalidArgument unless these are what a source can have: see `Entry`."""
    check_count("documents", documents, 0, MOST)
    check_count("duplicates", duplicates, 0, MOST)
    _check_counts("skipped", skipped, MOST)
    if not isinstance(examples, list | tuple) or not all(map(_is_pair, examples)):
        raise InvalidArgument(f"examples = {shown(examples)} must be pairs of texts: where and why")


def _is_pair(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _check_counts(name: str, values: object, most: int) -> None:
    if not isinstance(values, dict):
        raise InvalidArgument(f"{name} = {shown(values)} must be an object of counts")
    for key, value in values.items():
        check_count(f"{name} of {shown(key)}", value, 0, most)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What makes two preparations of the same sources write the same files.

    Attributes:
        tokenizer, tokenizer_digest: the tokenizer's name, and the SHA-256 of its file.
        validation: the share of documents in the validation split, in [0, 1).
        field: the field that holds the text in JSONL, Parquet and data sets.
        max_document_bytes: the size of the longest document.
    """

    tokenizer: str
    tokenizer_digest: str
    validation: float
    field: str
    max_document_bytes: int

    def __post_init__(self) -> None:
        for name in ("tokenizer", "tokenizer_digest", "field"):
            check_text(name, getattr(self, name))
        check_number("validation", self.validation, 0, 1)
        if self.validation == 1:
            raise InvalidArgument("validation = 1 leaves no document for training; allowed is a share below 1")
        check_count("max_document_bytes", self.max_document_bytes, 1, MOST)


class Journal:
    """The lines of an unfinished preparation, read at the start and appended to.

    Args:
        path: where the journal is.
        settings: the settings of this run.
        sources: the sources that this run shall read, in order; entries that do not match them in order are dropped.
        files: the names of the files of the corpus; an entry that does not prove each of them is dropped, with those
            behind it.

    Raises:
        InvalidArgument: the journal was written with other settings.
        CorpusError: the journal cannot be read.
    """

    def __init__(self, path: Path, settings: Settings, sources: list[Source], files: Collection[str]) -> None:
        lines = _read_lines(path)
        header = lines[0][1] if lines else asdict(settings)
        if header != asdict(settings):
            changed = (
                f"{name} {shown(header.get(name))}, not {value!r}"
                for name, value in asdict(settings).items()
                if header.get(name) != value
            )
            raise InvalidArgument(
                f"{path.parent} holds an unfinished corpus with {', '.join(changed)}; "
                "allowed are the same settings, another folder or --overwrite"
            )
        entries = list(_entries((line for _, line in lines[1:]), files))
        matching = 0
        while matching < min(len(entries), len(sources)) and entries[matching].source == sources[matching]:
            matching += 1
        self.entries = _proved(path.parent, entries[:matching])
        self._file = AppendFile(path, lines[len(self.entries)][0] if lines else 0)
        if not lines:
            self._append(header)

    def add(self, entry: Entry) -> None:
        """Records that a source is finished; its files must have been flushed before."""
        self.entries.append(entry)
        self._append(asdict(entry))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _append(self, line: dict[str, Any]) -> None:
        self._file.append(json.dumps(line).encode() + b"\n")
        self._file.mark()


def _read_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Returns the lines up to the first that is torn, each with where in the file it ends."""
    lines: list[tuple[int, dict[str, Any]]] = []
    end = 0
    try:
        data = read_regular(path) if path.exists() else b""
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or error}") from error
    for line in data.splitlines(keepends=True):
        end += len(line)
        try:
            content = parse_json(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(content, dict):
            break
        lines.append((end, content))
    return lines


def _entries(lines: Iterable[dict[str, Any]], files: Collection[str]) -> Iterator[Entry]:
    """Yields what lines say, up to the first that says what no line of ours does."""
    for line in lines:
        try:
            entry = from_mapping(Entry, {**line, "source": from_mapping(Source, line.get("source"))})
        except InvalidArgument:
            return
        if not set(entry.sizes) == set(entry.crcs) == set(files):
            return
        yield replace(entry, examples=tuple((where, reason) for where, reason in entry.examples))


def _proved(folder: Path, entries: list[Entry]) -> list[Entry]:
    """Returns the entries up to the first whose bytes are not in the files."""
    starts = dict.fromkeys(entries[0].sizes, 0) if entries else {}
    proved = len(entries)
    for name in starts:
        good = 0
        path = folder / name
        if path.exists():
            with path.open("rb") as file:
                for entry in entries[:proved]:
                    if _crc(file, entry.sizes[name] - starts[name]) != entry.crcs[name]:
                        break
                    starts[name] = entry.sizes[name]
                    good += 1
        proved = min(proved, good)
    return entries[:proved]


def _crc(file: Any, size: int) -> int | None:
    """Returns the CRC of the next bytes of a file; None if there are fewer."""
    crc = 0
    while size > 0:
        block = file.read(min(size, _BLOCK))
        if not block:
            return None
        crc = zlib.crc32(block, crc)
        size -= len(block)
    return crc
