"""A chunk memory that several processes hold together: each keeps some chunks, and only scores and results travel."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from hsa_compile.checks import check_choice, check_count
from hsa_compile.errors import InvalidArgument
from hsa_compile.model.memory.landmarks import Run, weighed
from hsa_compile.model.memory.memory import ChunkMemory
from hsa_compile.problem import FUSIONS, MAX_SELECTED

TURN = 1024  # so many new chunks go to one process before it is another one's turn
GATHER_BYTES = 2**28  # how many bytes of candidates are brought together at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Chunks `first … last − 1` of a row, which one process holds."""

    owner: int
    first: int
    last: int


class SharedMemory:
    """The chunks of texts whose memory processes share; it stands where a `ChunkMemory` of one process does.

    All processes call the same methods in the same order with equal arguments. Only what they add to their `own` chunks
    may differ, and `note` then says in all of them how many these are. Retrieval gathers the best candidates of each
    process. Attention is a sum over picked chunks: each process adds up those that it holds, and an all-reduce adds
    these sums.

    Args:
        own: the memory of the chunks that this process holds, empty.
        mesh: the processes, in one dimension.
    """

    def __init__(self, own: ChunkMemory, mesh: DeviceMesh) -> None:
        self.own, self.mesh = own, mesh
        self._rows: list[list[Span]] = [[] for _ in range(own.shape.batch)]

    @property
    def num_chunks(self) -> list[int]:
        """How many chunks each row has, over all processes."""
        return [spans[-1].last if spans else 0 for spans in self._rows]

    @property
    def nbytes(self) -> Mapping[str, int]:
        """Bytes that this process reserves, as `ChunkMemory.nbytes`."""
        return self.own.nbytes

    @property
    def rank(self) -> int:
        """The number of this process among those that share the memory."""
        return self.mesh.get_local_rank()

    def append(self, k: Tensor, v: Tensor, landmarks: Tensor, counts: Sequence[int] | None = None) -> None:
        """Adds chunks, which all processes have computed, at the end of each row; one process keeps those of a row.

        The arguments are those of `ChunkMemory.append`.
        """
        counts = [k.shape[1]] * len(self._rows) if counts is None else [int(count) for count in counts]
        owners = [self._next_owner(spans) for spans in self._rows]
        mine = [count if owner == self.rank else 0 for owner, count in zip(owners, counts, strict=True)]
        self.own.append(k, v, landmarks, mine)
        self.note([[count if part == owner else 0 for part in range(self.mesh.size())]
                   for owner, count in zip(owners, counts, strict=True)])  # fmt: skip

    def note(self, counts: Sequence[Sequence[int]]) -> None:
        """Notes chunks that each process has added to its own memory.

        Args:
            counts: for each row, how many chunks process 0, 1, … has added; they follow in this order.
        """
        for spans, added in zip(self._rows, counts, strict=True):
            for owner, count in enumerate(added):
                end = spans[-1].last if spans else 0
                if count and spans and spans[-1].owner == owner:
                    spans[-1] = replace(spans[-1], last=end + count)
                elif count:
                    spans.append(Span(owner=owner, first=end, last=end + count))

    def overwrite(self, row: int, first_chunk: int, k: Tensor, v: Tensor, landmarks: Tensor) -> None:
        """Replaces chunks, each where it lies; the arguments are those of `ChunkMemory.overwrite`."""
        for run, place in self._runs_within(row, first_chunk, first_chunk + len(k)):
            part = slice(place, place + run.count)
            self.own.overwrite(row, run.first, k[part], v[part], landmarks[part])

    def read(self, row: int, first_chunk: int, last_chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns chunks as `ChunkMemory.read` does; those that other processes hold are zero.

        That is enough to `overwrite` them later with what they were.
        """
        shape, n = self.own.shape, last_chunk - first_chunk
        k = torch.zeros(n, shape.chunk_size, shape.num_kv_heads, shape.head_dim, dtype=shape.dtype)
        v = torch.zeros(n, shape.chunk_size, shape.num_kv_heads, shape.value_dim, dtype=shape.dtype)
        landmarks = torch.zeros(shape.landmarks(n), dtype=shape.landmark_dtype)
        whole = tuple(x.to(self.own.device) for x in (k, v, landmarks))
        for run, place in self._runs_within(row, first_chunk, last_chunk):
            for x, part in zip(whole, self.own.read(row, run.first, run.first + run.count), strict=True):
                x[place : place + run.count] = part
        return whole[0], whole[1], whole[2]

    def truncate(self, counts: Sequence[int]) -> None:
        """Forgets the newest chunks; the argument is that of `ChunkMemory.truncate`."""
        counts = [int(count) for count in counts]
        there = self.num_chunks
        if len(counts) != len(there) or not all(0 <= n <= most for n, most in zip(counts, there, strict=True)):
            raise InvalidArgument(f"counts = {counts} must be {len(there)} integers of at most {there}")
        self._rows = [
            [replace(span, last=min(span.last, count)) for span in spans if span.first < count]
            for spans, count in zip(self._rows, counts, strict=True)
        ]
        self.own.truncate([sum(run.count for run in self._runs(row)) for row in range(len(counts))])

    def take(self, rows: Sequence[int]) -> "SharedMemory":
        """Returns a memory of some of the rows, as `ChunkMemory.take` does."""
        taken = copy.copy(self)
        taken.own = self.own.take(rows)
        taken._rows = [list(self._rows[row]) for row in rows]
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
        """Picks the best chunks of all processes; arguments and results are those of `ChunkMemory.select`."""
        check_count("top_k", top_k, 1, MAX_SELECTED)
        check_choice("fusion", fusion, FUSIONS)
        chunk_size = 1 if once_a_chunk else self.own.shape.chunk_size
        query = query.to(self.own.shape.landmark_dtype)
        rows = [(position, tuple(self._runs(b))) for b, position in enumerate(positions)]
        parts = [slice(None)] if len(set(rows)) == 1 else [slice(b, b + 1) for b in range(len(rows))]
        found = [
            self.own.landmarks.candidates(
                query[part], part, runs, position, chunk_size=chunk_size, top_k=top_k, fusion=fusion
            )
            for part, (position, runs) in zip(parts, rows, strict=False)
        ]
        own_chunks, own_scores = (torch.cat(each) for each in zip(*found, strict=True))
        # Numbers of chunks are below 2⁴⁰, and float64 holds those: one message brings both.
        packed = torch.stack((own_chunks.double(), own_scores))
        tokens = max(1, GATHER_BYTES // max(1, self.mesh.size() * packed[:, :, :1].nbytes))
        picked = []
        for part in packed.split(tokens, dim=2):
            part = part.contiguous()
            gathered = [torch.empty_like(part) for _ in range(self.mesh.size())]
            dist.all_gather(gathered, part, group=self.mesh.get_group())
            chunks, scores = torch.cat(gathered, dim=-1).unbind()
            chunks, order = chunks.sort(dim=-1, descending=True)
            picked.append(weighed(chunks.int(), scores.gather(-1, order), top_k, fusion, query.dtype))
        indices, weights = zip(*picked, strict=True)
        return torch.cat(indices, dim=1), torch.cat(weights, dim=1)

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
        """Reads from the chosen chunks of all processes; arguments and result are those of `ChunkMemory.attend`."""
        here = torch.stack([self._here(row, indices) for row, indices in enumerate(chunk_indices)])
        part = self.own.attend(
            q,
            here,
            chunk_weights,
            scale=scale,
            softmax_off_by_one=softmax_off_by_one,
            mask_last_token=mask_last_token,
        )
        # Sums of half precision are added in float32, so that the number of processes costs no precision.
        added = (part if part.dtype == torch.float64 else part.float()).contiguous()
        dist.all_reduce(added, group=self.mesh.get_group())
        return added.to(q.dtype)

    def agreed(self, tokens: Tensor) -> Tensor:
        """Returns the first process's tokens, so that all read on alike even if their logits differ by rounding."""
        dist.broadcast(tokens, group=self.mesh.get_group(), group_src=0)
        return tokens

    def _next_owner(self, spans: list[Span]) -> int:
        """Returns which process keeps the next chunk: that of the newest until its turn is over, then the emptiest."""
        if spans and spans[-1].last - spans[-1].first < TURN:
            return spans[-1].owner
        held = [0] * self.mesh.size()
        for span in spans:
            held[span.owner] += span.last - span.first
        return held.index(min(held))

    def _runs(self, row: int) -> list[Run]:
        """Returns the chunks of a row that this process holds."""
        mine = [span for span in self._rows[row] if span.owner == self.rank]
        counts = [span.last - span.first for span in mine]
        firsts = accumulate(counts, initial=0)
        return [Run(chunk=span.first, first=first, count=count)
                for span, first, count in zip(mine, firsts, counts, strict=False)]  # fmt: skip

    def _runs_within(self, row: int, first: int, last: int) -> list[tuple[Run, int]]:
        """Returns the own chunks among `first … last − 1` of a row, each run with its place behind `first`."""
        found = []
        for run in self._runs(row):
            begin, end = max(first, run.chunk), min(last, run.chunk + run.count)
            if begin < end:
                part = Run(chunk=begin, first=run.first + begin - run.chunk, count=end - begin)
                found.append((part, begin - first))
        return found

    def _here(self, row: int, chunks: Tensor) -> Tensor:
        """Turns chunks of a row into their numbers in the own memory; −1 for those that this process does not hold."""
        runs = self._runs(row)
        if not runs:
            return torch.full_like(chunks, -1)
        begins, firsts, counts = (
            torch.tensor(values, device=chunks.device)
            for values in zip(*((run.chunk, run.first, run.count) for run in runs), strict=True)
        )
        wanted = chunks.long()
        place = (torch.searchsorted(begins, wanted, right=True) - 1).clamp(min=0)
        offset = wanted - begins[place]
        return torch.where((offset >= 0) & (offset < counts[place]), firsts[place] + offset, -1).to(chunks.dtype)
