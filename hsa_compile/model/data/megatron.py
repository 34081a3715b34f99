"""The documents of Megatron's pairs of files: `NAME.bin` holds token ids, and `NAME.idx` says where documents end.

Both are little-endian. The index begins with a magic number, the version (uint64), the code of the ids' dtype (uint8),
the number of sequences and that of document ends (uint64 each). Then come the length of each sequence (int32), the byte
of the other file where it begins (int64), and for each document, and once behind the last one, the number of its first
sequence (int64). Sequences lie one after the other, so that a document is one range of ids.
"""

import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from hsa_compile.errors import UnreadableSource
from hsa_compile.files import open_regular

INDEX, IDS = ".idx", ".bin"
_MAGIC, _VERSION = b"MMIDIDX\0\0", 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}  # 6 and 7 are floats, no ids
_FLOATS = {6: "float64", 7: "float32"}
_BLOCK = 1 << 16  # how many documents have their ends in memory
Array = npt.NDArray[Any]


def megatron_documents(index_path: Path, max_bytes: int) -> Iterator[Array | None]:
    """Yields the ids of each document, none of them negative, and None for a document of more than `max_bytes`.

    Raises:
        UnreadableSource: a file is missing or damaged, or the two do not belong together; the message says how.
        OSError: a file cannot be read.
    """
    with ExitStack() as opened:
        index = opened.enter_context(os.fdopen(open_regular(index_path), "rb"))
        dtype, num_sequences, num_ends = _header(index)
        try:
            ids = opened.enter_context(os.fdopen(open_regular(index_path.with_suffix(IDS)), "rb"))
        except FileNotFoundError as error:
            raise UnreadableSource(f"there is no {index_path.with_suffix(IDS).name} beside it") from error
        number = 0
        for first, lasts in _ranges(index, num_sequences, num_ends, dtype.itemsize, _size(ids)):
            for last in lasts.tolist():
                number += 1
                yield None if (last - first) * dtype.itemsize > max_bytes else _read(ids, dtype, first, last, number)
                first = last


def _header(index: IO[bytes]) -> tuple[np.dtype[Any], int, int]:
    head = index.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise UnreadableSource("no index of Megatron: it does not begin with MMIDIDX")
    _, version, code, num_sequences, num_ends = _HEADER.unpack(head)
    if version != _VERSION:
        raise UnreadableSource(f"version {version} of Megatron's index; {_VERSION} can be read")
    if code not in _DTYPES:
        allowed = ", ".join(f"{number} ({name})" for number, name in _DTYPES.items())
        raise UnreadableSource(f"ids of dtype {code} ({_FLOATS.get(code, 'unknown')}); allowed are {allowed}")
    size, told = _size(index), _HEADER.size + 12 * num_sequences + 8 * num_ends
    if size != told:
        raise UnreadableSource(
            f"damaged index: it has {size} bytes; {num_sequences} sequences and {num_ends} document ends take {told}"
        )
    return np.dtype(_DTYPES[code]).newbyteorder("<"), num_sequences, num_ends


def _ranges(
    index: IO[bytes], num_sequences: int, num_ends: int, itemsize: int, num_bytes: int
) -> Iterator[tuple[int, Array]]:
    """Yields blocks of documents: where the first one begins, and where each one ends, counted in ids."""
    lengths, begins = _HEADER.size, _HEADER.size + 4 * num_sequences
    ends = begins + 8 * num_sequences
    at, position, sequence = 0, 0, 0
    while at < num_ends:
        block = _numbers(index, ends + 8 * at, "<i8", min(_BLOCK, num_ends - at))
        is_sorted = block[0] >= sequence and bool((block[1:] >= block[:-1]).all())
        if not is_sorted or block[-1] > num_sequences or (at == 0 and block[0] != 0):
            raise UnreadableSource(f"damaged index: documents {at} … {at + len(block) - 1} do not follow each other")
        count = int(block[-1]) - sequence
        size = _numbers(index, lengths + 4 * sequence, "<i4", count).astype(np.int64)
        begin = _numbers(index, begins + 8 * sequence, "<i8", count)
        total = position + np.concatenate(([0], np.cumsum(size)))
        wrong = np.flatnonzero((size < 0) | (begin != total[:-1] * itemsize))
        if wrong.size:
            place = int(wrong[0])
            raise UnreadableSource(
                f"damaged index: sequence {sequence + place} has {size[place]} ids from byte {begin[place]} on; "
                f"the one before it ends at byte {total[place] * itemsize}"
            )
        _check_bytes(int(total[-1]) * itemsize, num_bytes)
        yield position, total[block - sequence][1 if at == 0 else 0 :]
        at, position, sequence = at + len(block), int(total[-1]), int(block[-1])
    if sequence != num_sequences:
        raise UnreadableSource(f"damaged index: its documents have {sequence} sequences, and it has {num_sequences}")
    _check_bytes(position * itemsize, num_bytes, whole=True)


def _check_bytes(told: int, found: int, *, whole: bool = False) -> None:
    if told > found or (whole and told != found):
        raise UnreadableSource(f"the {IDS} file has {found} bytes; the index speaks of {told}")


def _read(ids: IO[bytes], dtype: np.dtype[Any], first: int, last: int, number: int) -> Array:
    found = _numbers(ids, first * dtype.itemsize, dtype, last - first)
    if found.size and found.min() < 0:
        raise UnreadableSource(f"document {number} holds the id {found.min()}; ids are 0 or more")
    return found


def _numbers(file: IO[bytes], place: int, dtype: npt.DTypeLike, count: int) -> Array:
    file.seek(place)
    data = file.read(count * np.dtype(dtype).itemsize)
    if len(data) < count * np.dtype(dtype).itemsize:
        raise UnreadableSource("a file was cut while it was read")
    return np.frombuffer(data, dtype)


def _size(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size
