"""Files that are there as a whole or not at all, and the reading of files that somebody else may have put there."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hsa_compile.errors import HSACompileError, SaveError

MOST_BYTES = 1 << 28  # how much `read_regular` reads: far more than any file of ours holds
MOST_LINE_BYTES = 1 << 20
_BLOCK = 1 << 22
_SUM = "sha256"
MOST_LEVELS = 64  # how deep JSON may be nested: far deeper than ours is, and no recursion over it runs out of stack


def read_regular(path: Path, most: int = MOST_BYTES) -> bytes:
    """Reads a file that may be anything: a pipe or a device, on which others wait for ever, is refused.

    Raises:
        OSError: there is no such file, it is no regular file, it has more than `most` bytes, or it cannot be read.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"it has {size} bytes, more than {most}", str(path))
        return file.read(most)


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """Opens a file that may be anything, and returns its descriptor.

    Raises:
        OSError: there is no such file, it is no regular file, or it cannot be opened.
    """
    handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
    try:
        _check_regular(os.fstat(handle).st_mode, path)
    except OSError:
        os.close(handle)
        raise
    return handle


def _check_regular(mode: int, path: Path) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))


def read_lines(path: Path, start: int = 0) -> Iterator[bytes]:
    """Yields the lines of a file from a byte on, each with its end; one of over `MOST_LINE_BYTES` comes in pieces.

    Raises:
        OSError: as in `read_regular`, whatever the file's length.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        file.seek(start)
        while line := file.readline(MOST_LINE_BYTES):
            yield line


def parse_json(text: bytes | str) -> Any:
    """Returns what a JSON text holds, whoever wrote it.

    Raises:
        ValueError: the text is no JSON or no UTF-8, is nested deeper than `MOST_LEVELS`, or holds an integer of
            thousands of digits. NaN and Infinity are numbers here: who uses them checks them.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"it is nested deeper than {MOST_LEVELS} levels") from error
    level, depth = [value] if isinstance(value, dict | list) else [], 0
    while level:
        if (depth := depth + 1) > MOST_LEVELS:
            raise ValueError(f"it is nested deeper than {MOST_LEVELS} levels")
        items = (item for node in level for item in (node.values() if isinstance(node, dict) else node))
        level = [item for item in items if isinstance(item, dict | list)]
    return value


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all: beside it, synced, renamed. Others may read it if the umask lets them.

    A link stays, and the file that it names is replaced.

    Raises:
        OSError: the directory cannot be written, the disk is full, or no regular file is there; what was there is
            untouched.
    """
    _replace(Path(os.path.realpath(path)), lambda temporary: temporary.write_bytes(content))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    if path.exists():
        _check_regular(path.stat().st_mode, path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it, whatever the writer makes of it
        write(temporary)
        temporary.chmod(stat.S_IMODE(mode))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # not every file system lets a directory be synced
        sync_directory(path.parent)


def end_of_last_line(handle: int) -> int:
    """Cuts what a killed writer left of the last line of an open file, and returns where the next line begins."""
    size = end = os.fstat(handle).st_size
    while end:  # a piece at a time, from the last on: what was left may be longer than fits in memory
        start = max(0, end - MOST_LINE_BYTES)
        found = os.pread(handle, end - start, start).rfind(b"\n") + 1
        end = start + found
        if found:
            break
    if end < size:
        os.ftruncate(handle, end)
    return end


def append_line(path: Path, line: bytes) -> None:
    """Adds a line to a file, after what is whole in it, and syncs it. The caller holds a lock.

    Raises:
        OSError: the disk is full or read-only, or no regular file is there; what was there is untouched.
    """
    handle = open_regular(path, os.O_RDWR | os.O_CREAT)
    try:
        end = offset = end_of_last_line(handle)
        content = line + b"\n"
        try:
            while content:
                written = os.pwrite(handle, content, offset)
                offset, content = offset + written, content[written:]
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, end)
            raise
    finally:
        os.close(handle)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Replaces a file: at any moment the old one or the new one is there as a whole, never a part.

    Args:
        path: where the file is.
        write: fills the file whose path it is given.

    Raises:
        SaveError: the file cannot be written, or is no regular one; the old one is untouched.
    """
    try:
        _replace(path, write)
    except OSError as error:
        raise SaveError(f"{path} cannot be written ({error}); what was there is untouched") from error


def replace_text(path: Path, text: str) -> None:
    """Replaces a file by a text in UTF-8, as a whole or not at all (`replace_file`)."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def sync_directory(directory: Path) -> None:
    """Waits until names that came or went in a directory are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(directory: Path) -> None:
    """Makes a directory and those above it, unless they are there.

    Raises:
        SaveError: the directory cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"{directory} cannot be made: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Writes a value as an indented JSON file, as a whole or not at all (`replace_file`)."""
    replace_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, *, error: type[HSACompileError] = SaveError) -> dict[str, Any]:
    """Returns the object that a JSON file holds; raises the error if there is no such file, or it holds another."""
    try:
        value = parse_json(read_regular(path))
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror or reason}") from reason
    except ValueError as reason:
        raise error(f"{path} is damaged or no JSON: {reason}") from reason
    if not isinstance(value, dict):
        raise error(f"{path} holds a JSON {type(value).__name__}; an object is needed")
    return value


def write_summed_json(path: Path, content: dict[str, Any]) -> None:
    """Writes an object as JSON together with its checksum, as a whole or not at all (`replace_file`)."""
    write_json(path, {**content, _SUM: json_sha256(content)})


def read_summed_json(path: Path) -> dict[str, Any]:
    """Returns the object that `write_summed_json` wrote.

    Raises:
        SaveError: there is no such file, it holds something else, or its checksum is not that of its content.
    """
    content = read_json(path)
    if _SUM not in content:
        raise SaveError(f"{path} has no checksum; another program or version of hsa-compile wrote it")
    if content.pop(_SUM) != json_sha256(content):
        raise SaveError(f"{path} is damaged: its checksum does not match")
    return content


def json_sha256(content: dict[str, Any]) -> str:
    """Returns the SHA-256 of an object's JSON with sorted names."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's content.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def check_sha256(path: Path, expected: object, source: str, *, error: type[HSACompileError] = SaveError) -> None:
    """Raises the error unless a file can be read and has the SHA-256 that `source` names."""
    try:
        found = file_sha256(path)
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror or reason}") from reason
    if found != expected:
        raise error(f"{path} is damaged: its SHA-256 is not the one in {source}")
