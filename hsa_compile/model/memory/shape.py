"""The shape of a chunk memory, which all of its chunks share, and the table that says in which page a chunk lies."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hsa_compile.checks import check_choice, check_count, one_line, shown
from hsa_compile.errors import InvalidArgument
from hsa_compile.kernels.hsa_attention.dispatch import DTYPE_NAMES
from hsa_compile.problem import DTYPES, LANDMARKS_PER_CHUNK, MAX_CHUNK_SIZE, MAX_HEAD_DIM, MAX_RETRIEVAL_DIM


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryShape:
    """Sizes and dtypes of a memory; a page is the keys `[H, C, D]` and values `[H, C, Dv]` of a chunk.

    Attributes:
        batch: `B`, how many texts there are.
        num_kv_heads: `H`.
        head_dim, value_dim: `D`, `Dv`.
        chunk_size: `C`.
        retrieval_dim: `Dr`, the size of each of the `H` retrieval heads.
        landmarks_per_chunk: `R`.
        dtype, landmark_dtype: the dtype of keys and values, and that of landmarks.
    """

    batch: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    chunk_size: int
    retrieval_dim: int
    landmarks_per_chunk: int
    dtype: torch.dtype
    landmark_dtype: torch.dtype

    def __post_init__(self) -> None:
        for name, high in (
            ("batch", 2**20),
            ("num_kv_heads", 2**10),
            ("head_dim", MAX_HEAD_DIM),
            ("value_dim", MAX_HEAD_DIM),
            ("chunk_size", MAX_CHUNK_SIZE),
            ("retrieval_dim", MAX_RETRIEVAL_DIM),
        ):
            check_count(name, getattr(self, name), 1, high)
        check_choice("landmarks_per_chunk", self.landmarks_per_chunk, LANDMARKS_PER_CHUNK)
        for name in ("dtype", "landmark_dtype"):
            if getattr(self, name) not in DTYPE_NAMES:
                raise InvalidArgument(f"{name} = {shown(getattr(self, name))} is not one of {', '.join(DTYPES)}")

    @classmethod
    def of_names(cls, values: dict[str, Any]) -> "MemoryShape":
        """Reads the shape that `as_names` wrote.

        Raises:
            InvalidArgument: a value is missing or not allowed.
        """
        dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
        named = {name: dtypes.get(str(values.get(name)), values.get(name)) for name in ("dtype", "landmark_dtype")}
        try:
            return cls(**{**values, **named})
        except TypeError as error:
            raise InvalidArgument(f"shape {shown(values)} is not that of a memory ({one_line(error)})") from error

    def as_names(self) -> dict[str, int | str]:
        """Returns the attributes as JSON takes them, with dtypes by name."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {name: DTYPE_NAMES.get(value, value) for name, value in values.items()}

    def keys(self, num_pages: int) -> tuple[int, int, int, int]:
        """Returns the shape of the keys of so many pages."""
        return num_pages, self.num_kv_heads, self.chunk_size, self.head_dim

    def values(self, num_pages: int) -> tuple[int, int, int, int]:
        """Returns the shape of the values of so many pages."""
        return num_pages, self.num_kv_heads, self.chunk_size, self.value_dim

    def landmarks(self, num_chunks: int) -> tuple[int, int, int, int]:
        """Returns the shape of the landmarks of so many chunks."""
        return num_chunks, self.landmarks_per_chunk, self.num_kv_heads, self.retrieval_dim

    @property
    def page_bytes(self) -> int:
        """How many bytes a page takes."""
        return self.num_kv_heads * self.chunk_size * (self.head_dim + self.value_dim) * self.dtype.itemsize

    def check_chunks(self, k: Tensor, v: Tensor, landmarks: Tensor, lead: tuple[int, ...]) -> None:
        """Refuses chunks of another shape.

        Args:
            k: `[*lead, C, H, D]`.
            v: `[*lead, C, H, Dv]`.
            landmarks: `[*lead, R, H, Dr]`.
            lead: `B, n` or `n`.
        """
        rows = (*lead, self.chunk_size, self.num_kv_heads)
        for name, x, expected in (
            ("k", k, (*rows, self.head_dim)),
            ("v", v, (*rows, self.value_dim)),
            ("landmarks", landmarks, (*lead[:-1], *self.landmarks(lead[-1]))),
        ):
            if tuple(x.shape) != expected or not x.is_floating_point():
                raise InvalidArgument(f"{name} is {x.dtype} {list(x.shape)}; floats {list(expected)} are needed")


class PageTable:
    """Page numbers by row and chunk, on the CPU, at four bytes a chunk.

    Args:
        batch: how many rows there are.
    """

    def __init__(self, batch: int) -> None:
        self.counts = [0] * batch
        self._rows = [torch.empty(0, dtype=torch.int32)] * batch

    def append(self, row: int, first_page: int, count: int) -> None:
        """Notes that the next `count` chunks of a row lie in pages `first_page …`."""
        old, first, last = self._rows[row], self.counts[row], self.counts[row] + count
        if last > len(old):
            self._rows[row] = torch.empty(max(last, 2 * len(old)), dtype=torch.int32)
            self._rows[row][:first] = old[:first]
        self._rows[row][first:last] = torch.arange(first_page, first_page + count, dtype=torch.int32)
        self.counts[row] = last

    def replace(self, row: int, first_chunk: int, pages: Tensor) -> None:
        """Notes that chunks `first_chunk …` of a row lie in other pages."""
        self._rows[row][first_chunk : first_chunk + len(pages)] = pages.int()

    def truncate(self, counts: Sequence[int]) -> None:
        """Forgets all chunks of each row but so many at its beginning."""
        self.counts = list(counts)

    def take(self, rows: Sequence[int]) -> "PageTable":
        """Returns a table whose rows are copies of the named ones."""
        taken = PageTable(len(rows))
        taken.counts = [self.counts[row] for row in rows]
        taken._rows = [self._rows[row].clone() for row in rows]
        return taken

    def pages(self, row: int, first: int, last: int) -> Tensor:
        """Returns the pages of chunks `first … last − 1` of a row, int64."""
        return self._rows[row][first:last].long()

    def lookup(self, chunks: Tensor) -> Tensor:
        """Returns the pages of chunks `[B, …]`, on the CPU; −1 stays −1."""
        found = torch.full(chunks.shape, -1, dtype=torch.int64)
        for b, row in enumerate(self._rows):
            if self.counts[b]:
                found[b] = torch.where(chunks[b] >= 0, row[chunks[b].clamp(min=0).long()].long(), -1)
        return found
