"""The landmarks of the whole past, in segments that never move, and the search for the best chunks among them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from hsa_compile.kernels.select_chunks.op import select_chunks
from hsa_compile.kernels.select_host import stable_topk
from hsa_compile.model.memory.shape import MemoryShape

FIRST_SEGMENT_CHUNKS = 1024
SEGMENT_BYTES = 2**26  # a segment takes at most so many bytes
SCAN_TOKENS = 4  # up to so many tokens are compared with each landmark directly on a CPU, at the speed of its RAM
SCAN_ELEMENTS = 2**17  # how many elements of landmarks are scanned at a time, so that a CPU's cache holds them
GATHER_ELEMENTS = 2**23  # how many elements of picked landmarks are gathered at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Chunks that follow one another in a text, of which a store has only some.

    Attributes:
        chunk: the first of them in the text.
        first: the first of them in the store.
        count: how many there are.
    """

    chunk: int
    first: int
    count: int


class LandmarkStore:
    """The landmarks of a memory, by row and chunk.

    All rows share segments `[B, n, R, H, Dr]`, so that rows of equal length take one call of a kernel. On a CPU the
    part of a row that is not filled takes addresses but no RAM.

    Args:
        shape: the shape of the memory.
        device: the device on which the landmarks are.
    """

    def __init__(self, shape: MemoryShape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self._segments: list[tuple[int, Tensor]] = []  # the first chunk, [B, n, R, H, Dr]

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return sum(data.nbytes for _, data in self._segments)

    def write(self, row: int, chunk: int, landmarks: Tensor) -> None:
        """Puts `landmarks [n, R, H, Dr]` of any dtype at chunks `chunk …` of a row."""
        while self._capacity < chunk + len(landmarks):
            self._grow()
        for data, first, last in self._parts(chunk, chunk + len(landmarks)):
            data[row, first:last].copy_(landmarks[: last - first])
            landmarks = landmarks[last - first :]

    def read(self, row: int, first: int, last: int) -> Tensor:
        """Returns landmarks `[last − first, R, H, Dr]` of a row."""
        return torch.cat([data[row, begin:end] for data, begin, end in self._parts(first, last)])

    def take(self, rows: Sequence[int]) -> "LandmarkStore":
        """Returns a store whose rows are copies of the named ones."""
        taken = LandmarkStore(replace(self.shape, batch=len(rows)), self.device)
        taken._segments = [(first, data[list(rows)]) for first, data in self._segments]
        return taken

    def select(
        self, query: Tensor, positions: list[int], counts: list[int], *, chunk_size: int, top_k: int, fusion: str
    ) -> tuple[Tensor, Tensor]:
        """Returns what `select_chunks` finds among the first `counts` chunks of each row.

        Args:
            query: `[B, T, H, Dr]`, in the dtype of the landmarks.
            positions: where the first token of each row stands.
            counts: how many chunks each row has.
            chunk_size: a token at position p sees chunk i iff `p ≥ (i + 1) · chunk_size`.
            top_k: `K`, how many chunks a token picks.
            fusion: `softmax` or `stick_breaking`.
        """
        # Mostly positions alone say what can be seen. Tokens far behind the last chunk, padding, see all of them.
        seen = [(position + query.shape[1] - 1) // chunk_size for position in positions]
        limits = [None if n <= count else count for n, count in zip(seen, counts, strict=True)]
        rows = list(zip(positions, limits, strict=True))
        if len(set(rows)) == 1:
            return self._select(query, slice(None), *rows[0], chunk_size, top_k, fusion)
        parts = [
            self._select(query[b : b + 1], slice(b, b + 1), *row, chunk_size, top_k, fusion)
            for b, row in enumerate(rows)
        ]
        indices, weights = zip(*parts, strict=True)
        return torch.cat(indices), torch.cat(weights)

    def _select(
        self,
        query: Tensor,
        rows: slice,
        position: int,
        limit: int | None,
        chunk_size: int,
        top_k: int,
        fusion: str,
    ) -> tuple[Tensor, Tensor]:
        """Selects for rows that are equally long and see chunks below `limit`."""
        T = query.shape[1]
        found = []
        for first, data in self._segments:
            size = data.shape[1] if limit is None else min(data.shape[1], limit - first)
            if size <= 0 or position + T - 1 < (first + 1) * chunk_size:
                break
            if len(self._segments) == 1 and not _scans(query):
                return select_chunks(
                    query, data[rows, :size], chunk_size=chunk_size, top_k=top_k, offset=position, fusion=fusion
                )
            found.append(_candidates(query, data[rows, :size], first, position, chunk_size, top_k, fusion))
        return weighed(*_joined(found, query, top_k), top_k, fusion, query.dtype)

    def candidates(
        self,
        query: Tensor,
        rows: slice,
        runs: Sequence[Run],
        position: int,
        *,
        chunk_size: int,
        top_k: int,
        fusion: str,
    ) -> tuple[Tensor, Tensor]:
        """Returns the best landmarks of rows that hold only some of their texts' chunks, for `weighed`.

        Args:
            query: `[b, T, H, Dr]`, in the dtype of the landmarks.
            rows: which rows, `b` of them.
            runs: which chunks of its text the chunks of each of these rows are, rising.
            position: where the first token of each of these rows stands.
            chunk_size, top_k, fusion: as in `select`.

        Returns:
            the chunks `[b, T, H, K]` int32, −1 in empty slots, and their float64 scores, −∞ there.
        """
        found = []
        for run in runs:
            chunk = run.chunk
            for data, first, last in self._parts(run.first, run.first + run.count):
                if position + query.shape[1] - 1 >= (chunk + 1) * chunk_size:
                    landmarks = data[rows, first:last]
                    found.append(_candidates(query, landmarks, chunk, position, chunk_size, top_k, fusion))
                chunk += last - first
        return best(*_joined(found, query, top_k), top_k, query.dtype)

    @property
    def _capacity(self) -> int:
        return self._segments[-1][0] + self._segments[-1][1].shape[1] if self._segments else 0

    def _grow(self) -> None:
        """Adds as many landmarks again as there are, within bounds."""
        shape = self.shape
        chunk_bytes = shape.batch * math.prod(shape.landmarks(1)) * shape.landmark_dtype.itemsize
        size = max(1, min(SEGMENT_BYTES // chunk_bytes, max(FIRST_SEGMENT_CHUNKS, self._capacity)))
        # Zeros are needed, since kernels may compute a score before they mask it; a CPU's system gives RAM as they are
        # used.
        whole = (shape.batch, *shape.landmarks(size))
        self._segments.append((self._capacity, torch.zeros(whole, dtype=shape.landmark_dtype, device=self.device)))

    def _parts(self, first: int, last: int) -> Iterator[tuple[Tensor, int, int]]:
        """Yields the segments that hold any of these chunks, each with the range of its own that it holds."""
        for start, data in self._segments:
            begin, end = max(first - start, 0), min(last - start, data.shape[1])
            if begin < end:
                yield data, begin, end


def _scans(query: Tensor) -> bool:
    return query.device.type == "cpu" and query.shape[1] <= SCAN_TOKENS


def _candidates(
    query: Tensor, landmarks: Tensor, first: int, position: int, chunk_size: int, top_k: int, fusion: str
) -> tuple[Tensor, Tensor]:
    """Returns the best of landmarks that follow one another from chunk `first` on, and their scores."""
    skip = max(0, first * chunk_size - position)  # tokens before these chunks
    later, offset = query[:, skip:], position + skip - first * chunk_size
    if _scans(query):
        picks = _scan(later, landmarks, offset, chunk_size, top_k)
    else:
        picks, _ = select_chunks(later, landmarks, chunk_size=chunk_size, top_k=top_k, offset=offset, fusion=fusion)
    scores = _scores(later, landmarks, picks)
    chunks = pad(torch.where(picks >= 0, picks + first, -1), (0, 0, 0, 0, skip, 0), value=-1)
    return chunks, pad(scores, (0, 0, 0, 0, skip, 0), value=float("-inf"))


def _joined(found: list[tuple[Tensor, Tensor]], query: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Joins candidates of segments that follow one another; empty slots if there are none."""
    if not found:
        shape = (*query.shape[:3], top_k)
        nothing = torch.full(shape, -1, dtype=torch.int32, device=query.device)
        return nothing, torch.full(shape, float("-inf"), dtype=torch.float64, device=query.device)
    # Recent segments come in front, so that the chunks of the candidates fall, but for empty slots.
    chunks, scores = zip(*found[::-1], strict=True)
    return torch.cat(chunks, dim=-1), torch.cat(scores, dim=-1)


def _scan(query: Tensor, landmarks: Tensor, offset: int, chunk_size: int, top_k: int) -> Tensor:
    """Computes the indices of `select_chunks` for few tokens on a CPU, one pass over the landmarks for each token."""
    (B, T, H, dim), R = query.shape, landmarks.shape[2]
    query = query if query.dtype == torch.float64 else query.float()
    picks = torch.full((B, T, H, top_k), -1, dtype=torch.int32)
    n = min(landmarks.shape[1], (offset + T - 1) // chunk_size)
    rows = max(1, SCAN_ELEMENTS // (B * R * H * dim))
    # All tiles share buffers: memory of its own for each would cost more than the arithmetic.
    products, all_scores = query.new_empty(B, min(rows, n), R, H, dim), query.new_empty(B, n, H)
    sums = products.new_empty(products.shape[:-1])
    for t in range(T):
        scores = all_scores[:, : (offset + t) // chunk_size]
        for begin in range(0, scores.shape[1], rows):
            part, out = landmarks[:, begin : begin + rows], scores[:, begin : begin + rows]
            # Multiply and add up row by row: a matrix product may round equal rows differently by their place.
            part = part[:, : out.shape[1]]
            product = torch.mul(part, query[:, t, None, None], out=products[:, : out.shape[1]])
            torch.amax(torch.sum(product, dim=-1, out=sums[:, : out.shape[1]]), dim=2, out=out)
        columns = stable_topk(scores.transpose(1, 2).flatten(0, 1), min(top_k, scores.shape[1]))
        best = columns.view(B, H, columns.shape[1])
        picks[:, t, :, : best.shape[2]] = best.flip(-1)
    return picks


def _scores(query: Tensor, landmarks: Tensor, picks: Tensor) -> Tensor:
    """Returns float64 scores `[b, T, H, K]` of landmarks that were picked, −∞ for empty slots."""
    (B, _, H, K), R = picks.shape, landmarks.shape[2]
    b = torch.arange(B, device=query.device).view(-1, 1, 1, 1)
    h = torch.arange(H, device=query.device).view(-1, 1)
    tokens = max(1, GATHER_ELEMENTS // max(1, B * H * K * R * query.shape[3]))
    scores = []
    for q, index in zip(query.split(tokens, dim=1), picks.split(tokens, dim=1), strict=True):
        picked = landmarks[b, index.clamp(min=0), :, h].double()  # [b, t, H, K, R, Dr]
        scores.append((picked * q[:, :, :, None, None].double()).sum(-1).amax(-1) * query.shape[3] ** -0.5)
    return torch.cat(scores, dim=1).masked_fill(picks < 0, float("-inf"))


def best(chunks: Tensor, scores: Tensor, top_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Picks the best `top_k` of candidates whose chunks fall, by the rules of `select_chunks`.

    Args:
        chunks: `[B, T, H, M]` with M of at least `top_k`; −1 in empty slots, which may lie anywhere.
        scores: float64, −∞ in empty slots.
        top_k: `K`.
        dtype: the dtype of queries and landmarks.

    Returns:
        the chunks `[B, T, H, K]`, falling, and their scores.
    """
    M = chunks.shape[-1]
    if top_k < M:
        # They are sorted rising, so that the lower chunk wins of equal scores; compared in float32, as kernels do.
        rising = scores.to(_compared(dtype)).flip(-1).view(-1, M)
        columns = M - 1 - stable_topk(rising, top_k).view(*chunks.shape[:-1], top_k)
        chunks, scores = chunks.gather(-1, columns), scores.gather(-1, columns)
    chunks, order = chunks.sort(dim=-1, descending=True, stable=True)
    return chunks, scores.gather(-1, order)


def weighed(chunks: Tensor, scores: Tensor, top_k: int, fusion: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Picks as `best` does; returns the chunks and their weights, as `select_chunks` gives them."""
    chunks, scores = best(chunks, scores, top_k, dtype)
    return chunks, _weights(scores, fusion).to(_compared(dtype))


def _compared(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _weights(scores: Tensor, fusion: str) -> Tensor:
    """Computes weights as `select_weights_reference` does, from scores, most recent first and −∞ in empty slots."""
    filled = scores > float("-inf")
    if fusion == "softmax":
        return scores.masked_fill(~filled.any(-1, keepdim=True), 0).softmax(-1).masked_fill(~filled, 0)
    scores = scores.masked_fill(~filled, 0)
    before = pad(logsigmoid(-scores).cumsum(-1)[..., :-1], (1, 0))
    return (logsigmoid(scores) + before).exp().masked_fill(~filled, 0)
