"""From the parts of a chunk memory to the shards of its save, and back."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from hsa_compile.model.memory_files import SHARD_BYTES, Saved, map_shard
from hsa_compile.model.memory_landmarks import LandmarkStore
from hsa_compile.model.memory_pages import PagePool
from hsa_compile.model.memory_table import PageTable


def shards_of(pages: PagePool, table: PageTable, landmarks: LandmarkStore) -> Iterator[dict[str, Tensor]]:
    """The chunks of all rows, row after row, as many at a time as a shard takes."""
    numbers = torch.cat([table.pages(row, 0, count) for row, count in enumerate(table.counts)])
    size = max(1, SHARD_BYTES // pages.shape.page_bytes)
    for first in range(0, len(numbers), size):
        last = min(first + size, len(numbers))
        k, v = _pages(pages, numbers[first:last])
        parts = [landmarks.read(*part) for part in _rows(table.counts, first, last)]
        yield {"k": k, "v": v, "landmarks": torch.cat(parts)}


def restore(pages: PagePool, table: PageTable, landmarks: LandmarkStore, directory: Path, saved: Saved) -> None:
    """Fills an empty memory from a save. On `disk` keys and values stay in the shards, which are mapped.

    Raises:
        InvalidArgument: a shard is not what the manifest says.
    """
    shape, first = pages.shape, 0
    for shard in saved.shards:
        n = shard.num_chunks
        expected = {
            "k": (shape.keys(n), shape.dtype),
            "v": (shape.values(n), shape.dtype),
            "landmarks": ((n, shape.num_kv_heads, shape.retrieval_dim), shape.landmark_dtype),
        }
        tensors, mapping = map_shard(directory / saved.data / shard.name, expected)
        k, v, near = (tensors[name] for name in ("k", "v", "landmarks"))
        if pages.placement == "disk":
            pages.attach(k, v, mapping)
        else:
            pages.append(k, v)
        begin = first
        for row, chunk, end in _rows(saved.counts, first, first + n):
            landmarks.write(row, chunk, near[begin - first : begin - first + end - chunk])
            begin += end - chunk
        first += n
    first = 0
    for row, count in enumerate(saved.counts):
        table.append(row, first, count)
        first += count


def _pages(pages: PagePool, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Keys `[n, H, C, D]` and values of pages in any order, on the CPU."""
    heads = pages.shape.num_kv_heads
    rising, order = numbers.sort()
    slots = (rising.view(-1, 1) * heads + torch.arange(heads)).flatten()
    k, v = (x.unflatten(0, (-1, heads)) for x in pages.read(slots, len(slots), device=torch.device("cpu")))
    if torch.equal(rising, numbers):
        return k, v
    back = order.argsort()
    return k[back], v[back]


def _rows(counts: list[int], first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """Chunks `first … last − 1` of all rows laid end to end, as (row, its first chunk, the end)."""
    start = 0
    for row, count in enumerate(counts):
        begin, end = max(first - start, 0), min(last - start, count)
        if begin < end:
            yield row, begin, end
        start += count
