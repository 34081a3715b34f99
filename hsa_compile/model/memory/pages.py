"""The pages of the chunk memory: keys and values by page number, in segments in RAM or in files, which never move."""

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hsa_compile.model.memory.shape import MemoryShape

FIRST_SEGMENT_PAGES = 64
# The most that a segment takes in each place; a file takes no more room than is written.
SEGMENT_BYTES = {"device": 2**26, "host": 2**26, "disk": 2**30}
RESIDENT_BYTES = 2**26  # how much of mapped files may stay in RAM between two reads
FAULT_BYTES = 2**16  # how much the system makes resident around a byte that is read


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A run of pages, `first … first + size − 1`, that lie together.

    Attributes:
        first, size: the number of its first page, and how many pages it has.
        k, v: `[size, H, C, D]` and `[size, H, C, Dv]`; they are only read unless the segment is in RAM.
        place: `device`, `host` or `disk`.
        mapping: the mapping of the file that holds the pages, if there is one.
        file: the descriptor to write to, and where in it keys and values begin; None in RAM and in a saved shard.
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
        """Whether pages can be replaced; those of a saved shard cannot."""
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
        # Nothing is written through the mapping: there a full disk would be a SIGBUS, and written pages stay resident.
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
    """Makes room for `size` pages; on a CPU the system gives RAM to pages only when they are written."""
    k, v = (
        torch.empty(x, dtype=shape.dtype, device=device, pin_memory=pinned)
        for x in (shape.keys(size), shape.values(size))
    )
    return Segment(first=first, size=size, k=k, v=v, place=place)


def scratch_file(directory: Path) -> int:
    """Opens a file without a name, so that whatever happens to the process nothing is left; returns its descriptor.

    Raises:
        OSError: the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory) as file:
        return os.dup(file.fileno())


def file_segment(shape: MemoryShape, first: int, size: int, file: int) -> Segment:
    """Makes room for `size` pages at the end of a file, which grows by as much; the disk fills as they are written.

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
    """Returns a tensor that lies in a mapping, `offset` bytes from its beginning; it keeps the mapping alive."""
    count = torch.Size(shape).numel()
    return torch.frombuffer(mapping, dtype=dtype, count=count, offset=offset).view(shape)


class PagePool:
    """Pages that are appended and read by number.

    Args:
        shape: the shape of the memory, which says what a page is.
        device: the device to which `read` brings pages.
        placement: where pages lie: `device`, `host` or `disk`.
        directory: where the file of `disk` is made.
    """

    def __init__(self, shape: MemoryShape, *, device: torch.device, placement: str, directory: Path | None) -> None:
        self.shape, self.device, self.placement, self.directory = shape, device, placement, directory
        self.num_pages = 0
        self.shared = False  # whether several memories have pages here: then none is overwritten or used again
        self._segments: list[Segment] = []
        self._file: int | None = None
        self._resident = 0

    def append(self, k: Tensor, v: Tensor) -> int:
        """Adds pages.

        Args:
            k: `[n, H, C, D]`, of any dtype, on any device.
            v: `[n, H, C, Dv]`.

        Returns:
            the number of the first new page; the others follow.

        Raises:
            OSError: the disk is full; then nothing was added.
        """
        first, n = self.num_pages, len(k)
        while self._capacity < first + n:
            self._grow()
        self._write(first, k, v)
        self.num_pages += n
        return first

    def attach(self, k: Tensor, v: Tensor, mapping: mmap.mmap) -> int:
        """Adds the pages of a saved shard where they lie, and returns the number of the first."""
        assert self.num_pages == self._capacity, "shards come before what is appended"
        first = self.num_pages
        self._segments.append(Segment(first=first, size=len(k), k=k, v=v, place="disk", mapping=mapping))
        self.num_pages += len(k)
        return first

    def overwrite(self, pages: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Replaces pages, those of a saved shard or of several memories by new ones; returns the pages' numbers now.

        Args:
            pages: `[n]` int64, on the CPU.
            k: `[n, H, C, D]`.
            v: `[n, H, C, Dv]`.
        """
        fixed = torch.full((len(pages),), self.shared)
        for segment in self._segments:
            if not segment.writable:
                fixed |= (pages >= segment.first) & (pages < segment.first + segment.size)
        now = pages.clone()
        count = int(fixed.sum())
        if count:
            chosen = fixed.to(k.device)
            first = self.append(k[chosen], v[chosen])
            now[fixed] = torch.arange(first, first + count)
        for i in (~fixed).nonzero().view(-1).tolist():
            self._write(int(pages[i]), k[i : i + 1], v[i : i + 1])
        return now

    def release(self, pages: Tensor) -> None:
        """Gives back pages that this memory needs no more; the newest are used again, unless they are shared or saved.

        Args:
            pages: `[n]` int64, each once, on the CPU.
        """
        if self.shared:
            return
        first = self.num_pages - len(pages)
        fixed = max((s.first + s.size for s in self._segments if not s.writable), default=0)
        if first >= fixed and bool((pages >= first).all()):
            self.num_pages = first

    def read(self, slots: Tensor, size: int, *, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Brings heads of pages together on the device.

        Args:
            slots: `[U]` int64, rising, on the CPU: `page · H + head`.
            size: length of what is returned, at least U; what follows the first U is not written.
            device: where they are brought; the pool's device if None.

        Returns:
            keys `[size, C, D]` and values `[size, C, Dv]`.
        """
        device = device or self.device
        heads, chunk_size = self.shape.num_kv_heads, self.shape.chunk_size
        near = self.device if self.placement == "device" else torch.device("cpu")
        pinned = near.type == "cpu" and device.type == "cuda"
        k, v = (
            torch.empty(size, chunk_size, dim, dtype=self.shape.dtype, device=near, pin_memory=pinned)
            for dim in (self.shape.head_dim, self.shape.value_dim)
        )
        for segment, first, last in self._parts(slots):
            local = (slots[first:last] - segment.first * heads).to(near)
            torch.index_select(segment.k.flatten(0, 1), 0, local, out=k[first:last])
            torch.index_select(segment.v.flatten(0, 1), 0, local, out=v[first:last])
            if segment.mapping is not None:
                self._resident += 2 * (last - first) * FAULT_BYTES
        if self._resident > RESIDENT_BYTES:
            self._let_go()
        return k.to(device, non_blocking=pinned), v.to(device, non_blocking=pinned)

    def nbytes(self) -> dict[str, int]:
        """Bytes that are reserved, by place: `device`, `host`, `disk`."""
        total = {"device": 0, "host": 0, "disk": 0}
        for segment in self._segments:
            total[segment.place] += segment.k.nbytes + segment.v.nbytes
        return total

    @property
    def _capacity(self) -> int:
        return self._segments[-1].first + self._segments[-1].size if self._segments else 0

    def _grow(self) -> None:
        """Adds as many pages again as there are, within bounds."""
        most = max(1, SEGMENT_BYTES[self.placement] // self.shape.page_bytes)
        first = self._capacity
        size = min(most, max(FIRST_SEGMENT_PAGES, first))
        if self.placement == "disk":
            assert self.directory is not None
            if self._file is None:
                self._file = scratch_file(self.directory)
                weakref.finalize(self, os.close, self._file)
            self._segments.append(file_segment(self.shape, first, size, self._file))
            return
        near = self.device if self.placement == "device" else torch.device("cpu")
        pinned = self.placement == "host" and self.device.type == "cuda"
        self._segments.append(ram_segment(self.shape, first, size, device=near, pinned=pinned, place=self.placement))

    def _write(self, page: int, k: Tensor, v: Tensor) -> None:
        for segment in self._segments:
            first, last = max(page, segment.first), min(page + len(k), segment.first + segment.size)
            if first < last:
                segment.write(first - segment.first, k[first - page : last - page], v[first - page : last - page])

    def _parts(self, slots: Tensor) -> Iterator[tuple[Segment, int, int]]:
        """Yields the segments that hold any of the slots, each with the range of them that it holds."""
        starts = torch.tensor([segment.first * self.shape.num_kv_heads for segment in self._segments])
        bounds = [*torch.searchsorted(slots, starts).tolist(), len(slots)]
        for segment, first, last in zip(self._segments, bounds, bounds[1:], strict=False):
            if first < last:
                yield segment, first, last

    def _let_go(self) -> None:
        """Lets go of what was read from files: it stays in the system's cache, and no longer in this process."""
        for segment in self._segments:
            if segment.mapping is not None:
                segment.mapping.madvise(mmap.MADV_DONTNEED)
        self._resident = 0
