"""The documents of one source, in bounded memory; what cannot be used is named, never guessed at.

A text file is one document; above the limit it is cut at line ends, and a single line above it is skipped. A text
file with a NUL byte (binary) or with invalid UTF-8 is not used at all. In JSONL, a bad line is skipped and the rest is
read. A source that breaks off (vanished, damaged archive, no permission) is not used at all.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from hsa_compile.errors import UnreadableSource
from hsa_compile.model.data.sources import HUB, JSONL, PARQUET, Source
from hsa_compile.versions import require

MAX_DOCUMENT_BYTES = 64 * 2**20
_ROWS = 256

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A part of a source that was left out.

    Attributes:
        reason: a few words, the same for all of a kind, so that they can be counted.
        where: `line 17`, `row 3`; empty for the whole source.
    """

    reason: str
    where: str = ""


def read_documents(
    source: Source,
    *,
    field: str = "text",
    max_bytes: int = MAX_DOCUMENT_BYTES,
    on_progress: Progress = lambda count: None,
) -> Iterator[bytes | Skipped]:
    """Yields documents in UTF-8, without NUL, none of them empty, and what was skipped among them.

    Args:
        source: what to read.
        field: the field that holds the text in JSONL, Parquet and data sets.
        max_bytes: size of the longest document, which bounds the memory.
        on_progress: is told how many bytes were read from disk since the last call.

    Raises:
        UnreadableSource: nothing of this source shall be used; the message says why.
        MissingDependency: a package that reads this kind is not installed.
    """
    try:
        if source.kind == PARQUET:
            yield from _checked_rows(_parquet_rows(Path(source.path), field), max_bytes)
        elif source.kind == HUB:
            yield from _checked_rows(_hub_rows(source.path, field), max_bytes)
        else:
            with Path(source.path).open("rb") as raw:
                lines = _lines(_Told(_opened(raw, source.path), raw, on_progress), max_bytes)
                is_json = source.kind == JSONL
                yield from _json_documents(lines, field, max_bytes) if is_json else _text_documents(lines, max_bytes)
    except FileNotFoundError as error:
        raise UnreadableSource("vanished" if source.kind != HUB else f"not found: {error}") from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UnreadableSource(f"damaged archive: {error}") from error
    except OSError as error:
        raise UnreadableSource(f"cannot be read: {error.strerror or error}") from error


def _opened(raw: IO[bytes], path: str) -> IO[bytes]:
    """Opens the stream of the text itself, unpacked if the name says that it is packed."""
    if path.endswith(".gz"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if path.endswith(".zst"):
        zstandard = require("zstandard", path)
        return io.BufferedReader(_ZstdErrors(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)))
    return raw


class _ZstdErrors(io.RawIOBase):
    """Reads as zstandard does, but raises the EOFError that a damaged gzip raises instead of zstandard's own errors."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard

        try:
            return int(self._reader.readinto(buffer))
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from error


class _Told:
    """A stream that tells how far the file below it was read."""

    def __init__(self, stream: IO[bytes], raw: IO[bytes], on_progress: Progress) -> None:
        self._stream, self._raw, self._on_progress, self._told = stream, raw, on_progress, 0

    def readline(self, limit: int) -> bytes:
        line = self._stream.readline(limit)
        position = self._raw.tell()
        if position != self._told:
            self._on_progress(position - self._told)
            self._told = position
        return line


def _lines(stream: _Told, max_bytes: int) -> Iterator[bytes | None]:
    """Yields lines with their ends, and None for one that is too long; at most `max_bytes` of it are in memory."""
    while line := stream.readline(max_bytes + 1):
        if len(line) <= max_bytes:
            yield line
            continue
        if b"\0" in line:
            raise UnreadableSource("binary: holds NUL bytes")
        while line and not line.endswith(b"\n"):
            line = stream.readline(max_bytes)
        yield None


def _text_documents(lines: Iterator[bytes | None], max_bytes: int) -> Iterator[bytes | Skipped]:
    parts: list[bytes] = []
    size = 0
    is_empty = True
    for number, line in enumerate(lines, 1):
        is_empty = False
        if parts and (line is None or size + len(line) > max_bytes):
            yield from _text_document(parts)
            parts, size = [], 0
        if line is None:
            yield Skipped(reason=f"longer than {max_bytes} bytes", where=f"line {number}")
        else:
            parts.append(line)
            size += len(line)
    if is_empty:
        raise UnreadableSource("empty")
    yield from _text_document(parts)


def _text_document(parts: list[bytes]) -> Iterator[bytes | Skipped]:
    document = b"".join(parts)
    if b"\0" in document:
        raise UnreadableSource("binary: holds NUL bytes")
    try:
        document.decode()
    except UnicodeDecodeError as error:
        raise UnreadableSource("invalid UTF-8") from error
    if document.strip():
        yield document
    elif document:
        yield Skipped(reason="empty document")


def _json_documents(lines: Iterator[bytes | None], field: str, max_bytes: int) -> Iterator[bytes | Skipped]:
    is_empty = True
    for number, line in enumerate(lines, 1):
        is_empty = False
        if line is None:
            yield Skipped(reason=f"longer than {max_bytes} bytes", where=f"line {number}")
        elif line.strip():
            yield _json_document(line, field, f"line {number}")
    if is_empty:
        raise UnreadableSource("empty")


def _json_document(line: bytes, field: str, where: str) -> bytes | Skipped:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        return Skipped(reason="invalid UTF-8", where=where)
    except (ValueError, RecursionError):
        return Skipped(reason="no JSON", where=where)
    text = record.get(field) if isinstance(record, dict) else None
    return _checked(text, field, where)


def _checked(text: object, field: str, where: str) -> bytes | Skipped:
    if not isinstance(text, str):
        return Skipped(reason=f"no string in field {field!r}", where=where)
    if "\0" in text:
        return Skipped(reason="binary: holds NUL bytes", where=where)
    try:
        document = text.encode()
    except UnicodeEncodeError:
        return Skipped(reason="lone surrogate", where=where)
    return document if document.strip() else Skipped(reason="empty document", where=where)


def _checked_rows(rows: Iterator[bytes | Skipped], max_bytes: int) -> Iterator[bytes | Skipped]:
    is_empty = True
    for number, row in enumerate(rows, 1):
        is_empty = False
        too_long = isinstance(row, bytes) and len(row) > max_bytes
        yield Skipped(reason=f"longer than {max_bytes} bytes", where=f"row {number}") if too_long else row
    if is_empty:
        raise UnreadableSource("empty")


def _parquet_rows(path: Path, field: str) -> Iterator[bytes | Skipped]:
    pyarrow, parquet = require("pyarrow", str(path)), require("pyarrow.parquet", str(path))
    try:
        with parquet.ParquetFile(path) as table:
            if field not in table.schema_arrow.names:
                raise UnreadableSource(f"no column {field!r}; there are {', '.join(table.schema_arrow.names)}")
            rows = (row for batch in table.iter_batches(_ROWS, columns=[field]) for row in batch.column(0).to_pylist())
            for number, text in enumerate(rows, 1):
                yield _checked(text, field, f"row {number}")
    except pyarrow.ArrowException as error:
        raise UnreadableSource(f"damaged Parquet: {error}") from error


def _hub_rows(name: str, field: str) -> Iterator[bytes | Skipped]:
    datasets = require("datasets", f"hf:{name}")
    data_set, _, split = name.partition("@")
    try:
        rows = datasets.load_dataset(data_set, split=split or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield _checked(row.get(field), field, f"row {number}")
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise UnreadableSource(f"cannot be loaded: {error}") from error
