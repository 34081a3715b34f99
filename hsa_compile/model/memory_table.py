"""Which page holds each chunk of each row."""

from collections.abc import Sequence

import torch
from torch import Tensor


class PageTable:
    """Page numbers by row and chunk, on the CPU: four bytes a chunk.

    Args:
        batch: rows.
    """

    def __init__(self, batch: int) -> None:
        self.counts = [0] * batch
        self._rows = [torch.empty(0, dtype=torch.int32)] * batch

    def append(self, row: int, first_page: int, count: int) -> None:
        """The next `count` chunks of a row lie in pages `first_page …`."""
        old, first, last = self._rows[row], self.counts[row], self.counts[row] + count
        if last > len(old):
            self._rows[row] = torch.empty(max(last, 2 * len(old)), dtype=torch.int32)
            self._rows[row][:first] = old[:first]
        self._rows[row][first:last] = torch.arange(first_page, first_page + count, dtype=torch.int32)
        self.counts[row] = last

    def replace(self, row: int, first_chunk: int, pages: Tensor) -> None:
        """Chunks `first_chunk …` of a row lie in other pages."""
        self._rows[row][first_chunk : first_chunk + len(pages)] = pages.int()

    def truncate(self, counts: Sequence[int]) -> None:
        """Each row keeps its first so many chunks."""
        self.counts = list(counts)

    def pages(self, row: int, first: int, last: int) -> Tensor:
        """Pages of chunks `first … last − 1` of a row, int64."""
        return self._rows[row][first:last].long()

    def lookup(self, chunks: Tensor) -> Tensor:
        """Pages of chunks `[B, …]` on the CPU, −1 where there is −1."""
        found = torch.full(chunks.shape, -1, dtype=torch.int64)
        for b, row in enumerate(self._rows):
            if self.counts[b]:
                found[b] = torch.where(chunks[b] >= 0, row[chunks[b].clamp(min=0).long()].long(), -1)
        return found
