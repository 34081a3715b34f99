"""A file that only grows, can be cut back to where it stood, and knows the CRC of what was added since."""

import os
import zlib
from pathlib import Path

from hsa_compile.errors import CorpusError

_READ_BLOCK = 4 * 2**20


class AppendFile:
    """Bytes appended to a file, written in large blocks.

    Args:
        path: created if it is not there.
        size: what it is cut to at first; what lies beyond was half written by a process that died.

    Raises:
        CorpusError: at any call, the file cannot be written; the message names it and the reason.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self.path = path
        self.size = self._start = size
        self.crc = 0  # of what was appended since the last `mark`
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
        """Flushes; this is where `rollback` returns to and where the CRC begins anew."""
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
        """Closes without flushing: what was not marked counts for nothing."""
        os.close(self._handle)


def _cannot_write(path: Path, error: OSError) -> CorpusError:
    return CorpusError(
        f"cannot write {path}: {error.strerror}; what was finished is kept, and the same command goes on from there"
    )
