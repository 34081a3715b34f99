"""Lines added beside a schedule file since it was last written whole: a put costs the same however long the file is."""

import os
from pathlib import Path


def journal_path(path: Path) -> Path:
    """The journal of a schedule file."""
    return path.with_name(f"{path.name}.journal")


def journal_size(path: Path) -> int:
    """Bytes of a schedule file's journal; 0 if there is none."""
    try:
        return journal_path(path).stat().st_size
    except FileNotFoundError:
        return 0


def read_lines(path: Path) -> list[bytes]:
    """The whole lines of a schedule file's journal. What a killed writer left of its last one is not a line."""
    try:
        content = journal_path(path).read_bytes()
    except FileNotFoundError:
        return []
    return content.split(b"\n")[:-1]


def append_line(path: Path, line: bytes) -> None:
    """Adds a line and syncs it. The caller holds the lock.

    Raises:
        OSError: the disk is full or read-only; what was there is untouched.
    """
    handle = os.open(journal_path(path), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        end = _end_of_last_line(handle)
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


def _end_of_last_line(handle: int) -> int:
    """Where the next line begins: over what a killed writer left."""
    end = os.fstat(handle).st_size
    if end and os.pread(handle, 1, end - 1) != b"\n":
        end = os.pread(handle, end, 0).rfind(b"\n") + 1
        os.ftruncate(handle, end)
    return end


def _write_at(handle: int, offset: int, content: bytes) -> None:
    while content:
        written = os.pwrite(handle, content, offset)
        offset, content = offset + written, content[written:]
