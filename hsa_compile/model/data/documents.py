"""The documents of one source, in bounded memory; what cannot be used is named, never guessed at.

A text file is one document; above the limit it is cut at line ends, and a single line above it is skipped. A text
file with a NUL byte (binary) or with invalid UTF-8 is not used at all. In JSONL, a bad line is skipped and the rest is
read. A source that breaks off (vanished, damaged archive, no permission) is not used at all. A folder in which
Hugging Face's `save_to_disk` put a data set stands for the Arrow files in it.
"""

import gzip
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from hsa_compile.checks import check_choice, check_count, one_line, shown
from hsa_compile.errors import InvalidArgument, UnreadableSource
from hsa_compile.model.data.megatron import IDS, INDEX, megatron_documents
from hsa_compile.model.data.tokenizer import TokenArray
from hsa_compile.versions import require

TEXT, JSONL, PARQUET, ARROW, MEGATRON, HUB = "text", "jsonl", "parquet", "arrow", "megatron", "hub"
KINDS = (TEXT, JSONL, PARQUET, ARROW, MEGATRON, HUB)
HUB_PREFIX = "hf:"
COMPRESSIONS = (".gz", ".zst")
_SAVED = {"dataset_info.json", "state.json"}  # what `save_to_disk` puts beside the Arrow files of a data set
_SPLITS = "dataset_dict.json"  # and above the folders of its splits
_NO_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A file of documents, as it was when it was listed; two are equal if nothing was written in between.

    Attributes:
        path: the absolute path; for kind `hub` the name of a data set, with `@split` where one was named.
        kind: `text`, one document a file; `jsonl`, one a line; `parquet`, `arrow` and `hub`, one a row; `megatron`, the
            index of a pair of files, whose documents are token ids.
        size: how many bytes it has on disk, both files of a pair together; 0 for `hub`.
        modified_ns: when it was last changed, 0 for `hub`.
    """

    path: str
    kind: str
    size: int = 0
    modified_ns: int = 0

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        if not isinstance(self.path, str) or "\0" in self.path:
            raise InvalidArgument(f"path = {shown(self.path)} must be the path of a file or the name of a data set")
        check_count("size", self.size, 0, 2**63 - 1)
        check_count("modified_ns", self.modified_ns, -(2**63), 2**63 - 1)


def find_sources(named: Sequence[str | Path], *, without: Path | None = None) -> list[Source]:
    """Lists all files to read, each once; a folder stands for every file in it but hidden ones, sorted by path.

    Args:
        named: files, folders, and data sets as `hf:NAME` or `hf:NAME@SPLIT`.
        without: a folder to leave out, which is that of the corpus itself where it lies among its sources.

    Raises:
        InvalidArgument: a name leads to nothing, or to what is neither a file nor a folder.
    """
    found: dict[str, Source] = {}
    for name in named:
        if str(name).startswith(HUB_PREFIX):
            data_set = str(name).removeprefix(HUB_PREFIX)
            found.setdefault(str(name), Source(path=data_set, kind=HUB))
            continue
        path = Path(name).expanduser()
        if not (path.is_file() or path.is_dir()):
            what = "is neither a file nor a folder" if path.exists() else "does not exist"
            raise InvalidArgument(f"source {name} {what}; allowed are files, folders and hf:NAME")
        root = path.resolve()
        left_out = without.resolve() if without else None
        _add(found, _files_under(root, left_out) if root.is_dir() else [root])
    return list(found.values())


def stdlib_sources() -> list[Source]:
    """Lists the Python standard library's own sources, without its tests, which many distributions leave out."""
    root = Path(sysconfig.get_paths()["stdlib"]).resolve()
    files = (path for path in _files_under(root, None) if path.suffix == ".py")
    found: dict[str, Source] = {}
    _add(found, (path for path in files if not _NO_LIBRARY & set(path.relative_to(root).parts)))
    return list(found.values())


def kind_of(path: Path) -> str:
    """Says how a file is read, by its name without `.gz` or `.zst`; what is not known is text."""
    stem = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    kinds = {".jsonl": JSONL, ".ndjson": JSONL, ".parquet": PARQUET, ".arrow": ARROW, INDEX: MEGATRON}
    return kinds.get(stem.suffix, TEXT)


def _files_under(root: Path, left_out: Path | None) -> Iterator[Path]:
    seen = {root}  # a link may lead back to a folder above it, or to one that is read anyway
    for folder, folders, files in os.walk(root, followlinks=True):
        here = Path(folder)
        inside = {(here / name).resolve(): name for name in sorted(folders, reverse=True) if not name.startswith(".")}
        folders[:] = sorted(name for real, name in inside.items() if real not in seen and real != left_out)
        seen |= set(inside)
        left = _SAVED if set(files) >= _SAVED else {_SPLITS}  # what describes a data set is no document of it
        if here != left_out:
            yield from (here / name for name in sorted(files) if not name.startswith(".") and name not in left)


def _add(found: dict[str, Source], paths: Iterable[Path]) -> None:
    for path in paths:
        if path.suffix == IDS and path.with_suffix(INDEX).is_file():
            path = path.with_suffix(INDEX)
        parts = [path, path.with_suffix(IDS)] if kind_of(path) == MEGATRON else [path]
        try:
            status = [part.stat() for part in parts]
        except OSError:
            status = []  # a dangling link, or vanished just now: listed, and named as skipped when it is read
        if not status or path.is_file():  # pipes and devices in a folder are no documents
            size, modified = sum(part.st_size for part in status), max((part.st_mtime_ns for part in status), default=0)
            found.setdefault(str(path), Source(path=str(path), kind=kind_of(path), size=size, modified_ns=modified))


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
) -> Iterator[bytes | TokenArray | Skipped]:
    """Yields documents in UTF-8, without NUL, or as token ids; none of them is empty. Also yields what was skipped.

    Args:
        source: what to read.
        field: the field that holds the text in JSONL, Parquet, Arrow and data sets.
        max_bytes: size of the longest document, which bounds the memory.
        on_progress: is told how many bytes were read from disk since the last call.

    Raises:
        UnreadableSource: nothing of this source shall be used; the message says why.
        MissingDependency: a package that reads this kind is not installed.
    """
    try:
        if source.kind == PARQUET:
            yield from _checked_rows(_parquet_rows(Path(source.path), field), max_bytes)
        elif source.kind == ARROW:
            yield from _checked_rows(_arrow_rows(Path(source.path), field), max_bytes)
        elif source.kind == MEGATRON:
            yield from _token_documents(Path(source.path), max_bytes)
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
        raise UnreadableSource(f"damaged archive: {one_line(error)}") from error
    except OSError as error:
        raise UnreadableSource(f"cannot be read: {error.strerror or one_line(error)}") from error


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


def _token_documents(path: Path, max_bytes: int) -> Iterator[TokenArray | Skipped]:
    number = 0
    for number, ids in enumerate(megatron_documents(path, max_bytes), 1):
        if ids is None:
            yield Skipped(reason=f"longer than {max_bytes} bytes", where=f"document {number}")
        else:
            yield ids if ids.size else Skipped(reason="empty document", where=f"document {number}")
    if not number:
        raise UnreadableSource("empty")


def _parquet_rows(path: Path, field: str) -> Iterator[bytes | Skipped]:
    pyarrow, parquet = require("pyarrow", str(path)), require("pyarrow.parquet", str(path))
    try:
        with parquet.ParquetFile(path) as table:
            _check_column(field, table.schema_arrow.names)
            rows = (row for batch in table.iter_batches(_ROWS, columns=[field]) for row in batch.column(0).to_pylist())
            for number, text in enumerate(rows, 1):
                yield _checked(text, field, f"row {number}")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the latter: a name or a text is no UTF-8
        raise UnreadableSource(f"damaged Parquet: {one_line(error)}") from error


def _arrow_rows(path: Path, field: str) -> Iterator[bytes | Skipped]:
    """Reads the stream of Arrow that `save_to_disk` writes."""
    pyarrow = require("pyarrow", str(path))
    try:
        # A map of a file that is cut meanwhile would end the process.
        with pyarrow.OSFile(str(path)) as file, pyarrow.ipc.open_stream(file) as table:
            _check_column(field, table.schema.names)
            place = table.schema.names.index(field)
            for number, text in enumerate(_texts(batch.column(place) for batch in table), 1):
                yield _checked(text, field, f"row {number}")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UnreadableSource(f"damaged Arrow: {one_line(error)}") from error


def _texts(columns: Iterable[Any]) -> Iterator[object]:
    for column in columns:
        column.validate(full=True)  # offsets of a damaged file may lead anywhere
        yield from column.to_pylist()


def _check_column(field: str, names: Sequence[str]) -> None:
    if field not in names:
        raise UnreadableSource(f"no column {field!r}; there are {one_line(', '.join(names))}")


def _hub_rows(name: str, field: str) -> Iterator[bytes | Skipped]:
    datasets = require("datasets", f"hf:{name}")
    data_set, _, split = name.partition("@")
    try:
        rows = datasets.load_dataset(data_set, split=split or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield _checked(row.get(field), field, f"row {number}")
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise UnreadableSource(f"cannot be loaded: {one_line(error)}") from error
