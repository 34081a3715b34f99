"""The chunk memory: keys, values and landmarks of the whole past of a batch of texts, for inference."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hsa_compile.checks import check_choice, check_count
from hsa_compile.errors import InvalidArgument
from hsa_compile.model.config import PLACEMENTS
from hsa_compile.model.memory.attend import AttendOptions, attend
from hsa_compile.model.memory.files import read_manifest, restore, shards_of, write_save
from hsa_compile.model.memory.landmarks import LandmarkStore
from hsa_compile.model.memory.pages import PagePool
from hsa_compile.model.memory.shape import MemoryShape, PageTable
from hsa_compile.problem import FUSIONS, MAX_SELECTED


class ChunkMemory:
    """Holds chunks of the past in pages that never move; landmarks stay on the device, and only chosen chunks travel.

    Rows grow on their own. There are no gradients. `attend` runs kernels with one kv head, since a chunk is brought
    once for each head that chose it: `hsa_decode` with batch `B · H` for up to 16 tokens, `hsa_attention` with batch 1
    and `B · H · T` tokens above that. The number of chunks is rounded up to a power of two, so that few shapes come up.

    Args:
        batch: `B`, how many texts there are.
        num_kv_heads: `H`; there is one retrieval head for each.
        head_dim, value_dim: `D` and `Dv`, which is `D` if None.
        chunk_size: `C`.
        retrieval_dim: `Dr` of each retrieval head.
        landmarks_per_chunk: `R`; a chunk's score is the largest of those of its landmarks.
        dtype: the dtype in which keys and values are kept: float32, bfloat16 or float16; float64 on a CPU.
        landmark_dtype: the dtype of landmarks; `dtype` if None.
        device: where landmarks, queries and results are.
        placement: where keys and values are: on the `device`; on the `host`, in RAM, pinned if the device is a GPU; on
            `disk`, in a mapped file without a name in `directory`, which ends with this process.
        directory: where the file of `disk` is made.

    Raises:
        InvalidArgument: a value is not allowed; the message shows it and what is allowed.
    """

    def __init__(
        self,
        *,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        chunk_size: int,
        retrieval_dim: int,
        landmarks_per_chunk: int = 1,
        dtype: torch.dtype = torch.float32,
        landmark_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        placement: str = "device",
        directory: Path | str | None = None,
    ) -> None:
        check_choice("placement", placement, PLACEMENTS)
        if placement == "disk" and directory is None:
            raise InvalidArgument("directory = None; placement 'disk' needs one for its file")
        self.shape = MemoryShape(
            batch=batch,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_dim=head_dim if value_dim is None else value_dim,
            chunk_size=chunk_size,
            retrieval_dim=retrieval_dim,
            landmarks_per_chunk=landmarks_per_chunk,
            dtype=dtype,
            landmark_dtype=landmark_dtype or dtype,
        )
        self.device = torch.device(device)
        place = None if directory is None else Path(directory)
        self.pages = PagePool(self.shape, device=self.device, placement=placement, directory=place)
        self.table = PageTable(batch)
        self.landmarks = LandmarkStore(self.shape, self.device)

    @property
    def num_chunks(self) -> list[int]:
        """How many chunks each row has."""
        return list(self.table.counts)

    @property
    def nbytes(self) -> Mapping[str, int]:
        """Bytes reserved: `landmarks` on the device; keys and values on the `device`, the `host` and the `disk`.

        A CPU and a file system give room only to what is written; that is less by at most the size of one segment.
        """
        return {"landmarks": self.landmarks.nbytes, **self.pages.nbytes()}

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor, landmarks: Tensor, counts: Sequence[int] | None = None) -> None:
        """Adds chunks at the end of each row.

        Args:
            k: `[B, n, C, H, D]`, of any float dtype.
            v: `[B, n, C, H, Dv]`.
            landmarks: `[B, n, R, H, Dr]`.
            counts: how many of the n chunks each row takes, from the first on; all if None.

        Raises:
            InvalidArgument: a shape or count is not allowed.
            OSError: the disk is full; then the memory is as it was.
        """
        n = k.shape[1] if k.dim() == 5 else 0  # any, to be refused
        self.shape.check_chunks(k, v, landmarks, (self.shape.batch, n))
        counts = [n] * self.shape.batch if counts is None else [int(count) for count in counts]
        if len(counts) != self.shape.batch or not all(0 <= count <= n for count in counts):
            raise InvalidArgument(f"counts = {counts} must be {self.shape.batch} integers in 0 … {n}")
        # [chunks of all rows, H, C, D], row after row
        k, v = (torch.cat([x[b, :count] for b, count in enumerate(counts)]).transpose(1, 2) for x in (k, v))
        first = self.pages.append(k, v)
        for b, count in enumerate(counts):
            self.landmarks.write(b, self.num_chunks[b], landmarks[b, :count])
            self.table.append(b, first, count)
            first += count

    @torch.no_grad()
    def overwrite(self, row: int, first_chunk: int, k: Tensor, v: Tensor, landmarks: Tensor) -> None:
        """Replaces chunks that are there, when a text was edited and read again in part.

        Args:
            row: the number of the row in the batch.
            first_chunk: the first chunk that is replaced.
            k: `[n, C, H, D]`, of any float dtype.
            v: `[n, C, H, Dv]`.
            landmarks: `[n, R, H, Dr]`.

        Raises:
            InvalidArgument: a shape, the row or a chunk is not allowed.
            OSError: the disk is full; then some of these chunks may have been replaced.
        """
        n = k.shape[0] if k.dim() == 4 else 0  # any, to be refused
        self.shape.check_chunks(k, v, landmarks, (n,))
        self._check_row(row)
        count = self.num_chunks[row]
        if not 0 <= first_chunk <= count - n:
            raise InvalidArgument(
                f"first_chunk = {first_chunk} with {n} chunks must lie within the {count} chunks of row {row}"
            )
        last = first_chunk + n
        pages = self.table.pages(row, first_chunk, last)
        now = self.pages.overwrite(pages, k.transpose(1, 2), v.transpose(1, 2))
        self.table.replace(row, first_chunk, now)
        self.landmarks.write(row, first_chunk, landmarks)

    @torch.no_grad()
    def read(self, row: int, first_chunk: int, last_chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns chunks `first_chunk … last_chunk − 1` of a row, as `overwrite` takes them.

        Returns:
            k `[n, C, H, D]`, v `[n, C, H, Dv]`, landmarks `[n, R, H, Dr]`, in the dtypes in which they are kept.

        Raises:
            InvalidArgument: the row or a chunk is not there.
        """
        self._check_row(row)
        count = self.num_chunks[row]
        if not 0 <= first_chunk < last_chunk <= count:
            raise InvalidArgument(f"chunks {first_chunk} … {last_chunk - 1} must be some of the {count} of row {row}")
        H = self.shape.num_kv_heads
        pages, order = self.table.pages(row, first_chunk, last_chunk).sort()
        slots = (pages[:, None] * H + torch.arange(H)).flatten()
        sorted_k, sorted_v = self.pages.read(slots, len(slots))
        back = order.argsort().to(self.device)
        k, v = (x.unflatten(0, (-1, H))[back].transpose(1, 2) for x in (sorted_k, sorted_v))
        return k, v, self.landmarks.read(row, first_chunk, last_chunk)

    def truncate(self, counts: Sequence[int]) -> None:
        """Forgets the newest chunks.

        Args:
            counts: for each row, how many of its first chunks stay.

        Raises:
            InvalidArgument: a row has fewer chunks than should stay.
        """
        counts = [int(count) for count in counts]
        there = self.num_chunks
        if len(counts) != len(there) or not all(0 <= n <= most for n, most in zip(counts, there, strict=True)):
            raise InvalidArgument(f"counts = {counts} must be {len(there)} integers of at most {there}")
        dropped = [self.table.pages(row, n, there[row]) for row, n in enumerate(counts)]
        self.pages.release(torch.cat(dropped))
        self.table.truncate(counts)

    def take(self, rows: Sequence[int]) -> "ChunkMemory":
        """Returns a memory whose rows are some of this one's, each as often as it is named; both grow on their own.

        Keys and values are not copied: both memories read the same pages, and what either changes it writes anew.

        Args:
            rows: the numbers of the rows, at least one.

        Raises:
            InvalidArgument: a row is not there, or none is named.
        """
        for row in rows:
            self._check_row(row)
        taken = copy.copy(self)
        taken.shape = replace(self.shape, batch=len(rows))
        taken.table, taken.landmarks = self.table.take(rows), self.landmarks.take(rows)
        self.pages.shared = True
        return taken

    @torch.no_grad()
    def select(
        self,
        query: Tensor,
        positions: Sequence[int],
        *,
        top_k: int,
        fusion: str = "softmax",
        once_a_chunk: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Picks the best chunks for each token: `select_chunks` over all landmarks of its row, without gradients.

        Args:
            query: `[B, T, H, Dr]`, taken in the dtype of the landmarks.
            positions: where the first token of each row stands; a token at p sees chunk i iff `p ≥ (i + 1) · C`.
            top_k: `K`, how many chunks a token picks.
            fusion: `softmax` or `stick_breaking`.
            once_a_chunk: whether query row t stands for chunk `position + t`, which sees the chunks before it.

        Returns:
            chunk_indices `[B, T, H, K]` int32, most recent first, −1 in the tail where fewer than K are visible;
            chunk_weights `[B, T, H, K]`, 0 there.

        Raises:
            InvalidArgument: a shape or value is not allowed.
        """
        shape = self.shape
        B, H, Dr = shape.batch, shape.num_kv_heads, shape.retrieval_dim
        if list(query.shape) != [B, *query.shape[1:2], H, Dr]:
            raise InvalidArgument(f"query has shape {list(query.shape)}; [B, T, H, Dr] = [{B}, T, {H}, {Dr}] is needed")
        if query.device != self.device:
            raise InvalidArgument(f"query is on {query.device}; the memory's device is {self.device}")
        positions = [int(position) for position in positions]
        if len(positions) != self.shape.batch or not all(0 <= position < 2**40 for position in positions):
            raise InvalidArgument(f"positions = {positions} must be {self.shape.batch} integers in 0 … 2⁴⁰ − 1")
        check_count("top_k", top_k, 1, MAX_SELECTED)
        check_choice("fusion", fusion, FUSIONS)
        return self.landmarks.select(
            query.to(self.shape.landmark_dtype),
            positions,
            self.num_chunks,
            chunk_size=1 if once_a_chunk else self.shape.chunk_size,
            top_k=top_k,
            fusion=fusion,
        )

    @torch.no_grad()
    def attend(
        self,
        q: Tensor,
        chunk_indices: Tensor,
        chunk_weights: Tensor,
        *,
        scale: float | None = None,
        softmax_off_by_one: bool = False,
        mask_last_token: bool = False,
    ) -> Tensor:
        """Computes what `hsa_attention` reads from the chosen chunks.

        Args:
            q: `[B, T, HQ, D]`; keys and values are taken in its dtype.
            chunk_indices: `[B, T, H, K]` int32 or int64, in any order; −1 is an empty slot.
            chunk_weights: `[B, T, H, K]` or `[B, T, HQ, K]`.
            scale: factor of the logits; `D ** -0.5` if None.
            softmax_off_by_one: whether each chunk's normaliser has an extra 1.
            mask_last_token: whether the last key of each chunk is left out.

        Returns:
            `[B, T, HQ, Dv]` in the dtype of q; zeros where all slots are empty.

        Raises:
            InvalidArgument: a shape, dtype, device or index is not allowed.
        """
        options = AttendOptions(scale=scale, softmax_off_by_one=softmax_off_by_one, mask_last_token=mask_last_token)
        return attend(self.pages, self.table, q, chunk_indices, chunk_weights, options)

    @torch.no_grad()
    def save(self, directory: Path | str) -> None:
        """Makes `directory` a save of this memory; a save that is there stays whole until the new one is.

        Raises:
            InvalidArgument: something else lies in the directory.
            OSError: the disk is full or cannot be written; the save that was there is untouched.
        """
        shards = shards_of(self.pages, self.table, self.landmarks)
        write_save(Path(directory), self.shape.as_names(), self.num_chunks, shards)

    @classmethod
    @torch.no_grad()
    def load(
        cls,
        directory: Path | str,
        *,
        device: torch.device | str = "cpu",
        placement: str = "device",
        verify: bool = True,
    ) -> "ChunkMemory":
        """Opens the memory that was saved; what is done with it leaves the save as it is.

        Args:
            directory: the directory of the save. With `disk` keys and values are mapped, not read, and new ones go to a
                file without a name in it.
            device: as in the constructor.
            placement: as in the constructor.
            verify: whether to compare checksums, for which everything is read once.

        Raises:
            InvalidArgument: there is no save, or a file of it is damaged; the message names the file.
        """
        directory = Path(directory)
        saved = read_manifest(directory, verify=verify)
        try:
            shape = MemoryShape.of_names(saved.shape)
        except InvalidArgument as error:
            raise InvalidArgument(f"{directory} is not the save of a chunk memory: {error}") from error
        if len(saved.counts) != shape.batch:
            raise InvalidArgument(f"{directory} has {len(saved.counts)} counts for a batch of {shape.batch}")
        options = {name: getattr(shape, name) for name in shape.__slots__}
        memory = cls(**options, device=device, placement=placement, directory=directory)
        restore(memory.pages, memory.table, memory.landmarks, directory, saved)
        return memory

    def _check_row(self, row: int) -> None:
        if not 0 <= row < self.shape.batch:
            raise InvalidArgument(f"row = {row} must be in 0 … {self.shape.batch - 1}")
