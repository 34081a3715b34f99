"""Segments of the chunk memory: a run of pages, each the keys and values of one chunk, that never moves once made.

A segment lies in RAM, on the device, in a file that is mapped, or in a shard of a saved memory.
"""

import mmap
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hsa_compile.model.memory_shape import MemoryShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Pages `first … first + size − 1`.

    Attributes:
        first, size: page numbers.
        k, v: `[size, H, C, D]` and `[size, H, C, Dv]`; for reading alone unless the segment is in RAM.
        place: `device`, `host` or `disk`.
        mapping: of a file, if there is one.
        file: descriptor to write to, and where in it keys and values begin; None in RAM and in a saved shard.
    """

    first: int
    size: int
    k: Tensor
    v: Tensor
    place: str
    mapping: mmap.mmap | None = None
    file: tuple[int, int, int] | None = None

    @property
    def writable(self) -> bool:
        """Whether pages can be replaced: not in a saved shard."""
        return self.mapping is None or self.file is not None

    def write(self, page: int, k: Tensor, v: Tensor) -> None:
        """Puts pages `k [n, H, C, D]`, `v [n, H, C, Dv]` at `page`, counted from 0 in the segment.

        Raises:
            OSError: the disk is full.
        """
        if self.file is None:
            self.k[page : page + len(k)].copy_(k)
            self.v[page : page + len(v)].copy_(v)
            return
        # Not through the mapping: there a full disk would be a SIGBUS, and pages written would count as resident.
        file, k_start, v_start = self.file
        for x, new, start in ((self.k, k, k_start), (self.v, v, v_start)):
            flat = new.to("cpu", self.k.dtype).contiguous().view(torch.uint8)
            data = memoryview(flat.numpy().reshape(-1).data)
            offset = start + page * x[0].nbytes
            while len(data):
                written = os.pwrite(file, data, offset)
                data, offset = data[written:], offset + written


def ram_segment(
    shape: MemoryShape, first: int, size: int, *, device: torch.device, pinned: bool, place: str
) -> Segment:
    """Room for `size` pages; on a CPU the system gives RAM to pages only when they are written."""
    k, v = (
        torch.empty(x, dtype=shape.dtype, device=device, pin_memory=pinned)
        for x in (shape.keys(size), shape.values(size))
    )
    return Segment(first=first, size=size, k=k, v=v, place=place)


def scratch_file(directory: Path) -> int:
    """The descriptor of a file without a name, so that whatever happens to the process, nothing is left behind.

    Raises:
        OSError: the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory) as file:
        return os.dup(file.fileno())


def file_segment(shape: MemoryShape, first: int, size: int, file: int) -> Segment:
    """Room for `size` pages at the end of a file, which grows by as much; the disk is filled as they are written.

    Raises:
        OSError: the file cannot grow.
    """
    k_bytes = size * shape.num_kv_heads * shape.chunk_size * shape.head_dim * shape.dtype.itemsize
    length = -(-size * shape.page_bytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
    start = os.fstat(file).st_size
    os.ftruncate(file, start + length)
    mapping = mmap.mmap(file, length, offset=start)
    k = mapped_tensor(mapping, 0, shape.keys(size), shape.dtype)
    v = mapped_tensor(mapping, k_bytes, shape.values(size), shape.dtype)
    return Segment(first=first, size=size, k=k, v=v, place="disk", mapping=mapping, file=(file, start, start + k_bytes))


def mapped_tensor(mapping: mmap.mmap, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor that lies in a mapping, `offset` bytes from its beginning; it keeps the mapping alive."""
    count = torch.Size(shape).numel()
    return torch.frombuffer(mapping, dtype=dtype, count=count, offset=offset).view(shape)
