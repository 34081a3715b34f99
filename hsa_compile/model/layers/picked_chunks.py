"""Chunks that travel: where processes share rows too long to gather, each gets the chunks that its tokens picked.

`fetch_chunks` asks their owners for them, and `ChunkTraffic` says when that sends less than gathering all chunks once.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hsa_compile.kernels.hsa_attention.op import hsa_attention
from hsa_compile.model.config import AUTO, TRAVEL, ModelConfig
from hsa_compile.model.layers.basic import without_cpu_autocast
from hsa_compile.model.layers.exchange import SharedRows


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedChunks:
    """The chunks that a selection picks, brought from the processes that hold them.

    The list has an entry for each chunk and kv head that was picked, of whatever row: a token may read a chunk wherever
    it stands.

    Attributes:
        k, v: `[R, C, D]`.
        indices: `[B, T, H, K]` int32, the places of the picks in the list, −1 where a slot is empty.
    """

    k: Tensor
    v: Tensor
    indices: Tensor

    def attend(
        self, q: Tensor, indices: Tensor, weights: Tensor, *, softmax_off_by_one: bool, mask_last_token: bool
    ) -> Tensor:
        """Reads as `Memory.attend` does; what belongs to one kv head of a token counts as a token of its own."""
        B, T, H, K = indices.shape
        context, (q, k, v) = without_cpu_autocast(q, self.k, self.v)
        with context:
            o = hsa_attention(
                q.unflatten(2, (H, -1)).movedim(2, 0).flatten(0, 2)[None],
                k.flatten(0, 1)[None, :, None],
                v.flatten(0, 1)[None, :, None],
                indices.movedim(2, 0).reshape(1, -1, 1, K),
                weights.movedim(2, 0).reshape(1, -1, 1, K),
                chunk_size=k.shape[1],
                softmax_off_by_one=softmax_off_by_one,
                mask_last_token=mask_last_token,
            )
        return o.view(H, B, T, *o.shape[2:]).movedim(0, 2).flatten(2, 3)


def fetch_chunks(k: Tensor, v: Tensor, indices: Tensor, owners: SharedRows, *, in_batch: bool) -> FetchedChunks:
    """Brings the chunks that tokens picked to this process; all processes that share the rows call it together.

    Args:
        k, v: `[B, n, C, H, D]`, the chunks that this process holds.
        indices: `[B, T, H, K]`, the picks of its tokens among the N chunks of a row, −1 where a slot is empty.
        owners: which of the N chunks each process holds.
        in_batch: whether the picks are among the B · N chunks of all rows, as `SequenceMemory` numbers them.
    """
    B, _, H, _ = indices.shape
    end = B * H * owners.bounds[-1]
    numbers = torch.where(indices >= 0, _numbers(indices, owners, in_batch), end)
    is_picked = torch.zeros(end + 1, dtype=torch.bool, device=indices.device)
    is_picked.index_fill_(0, numbers.flatten(), True)
    wanted = is_picked[:end].nonzero().squeeze(1)
    places = torch.where(indices >= 0, (is_picked.cumsum(0) - 1)[numbers], -1)

    parts = SharedRows(mesh=owners.mesh, bounds=tuple(B * H * bound for bound in owners.bounds))
    found = parts.fetch(torch.cat((k, v), dim=-1).movedim(3, 2).flatten(0, 2), wanted)
    spare = _few_lengths(found.shape[0]) - found.shape[0]
    k, v = (F.pad(x, (0, 0, 0, 0, 0, spare)) for x in found.split((k.shape[-1], v.shape[-1]), dim=-1))
    return FetchedChunks(k=k, v=v, indices=places.to(torch.int32))


def _numbers(indices: Tensor, owners: SharedRows, in_batch: bool) -> Tensor:
    """Numbers what heads have of chunks: process by process, there row by row, chunk by chunk, head by head."""
    B, _, H, _ = indices.shape
    device, num_chunks = indices.device, owners.bounds[-1]
    chunk, row = indices.clamp(min=0).long(), torch.arange(B, device=device).view(-1, 1, 1, 1)
    if in_batch:
        row, chunk = (row + 1 + chunk // num_chunks) % B, chunk % num_chunks
    bounds = torch.tensor(owners.bounds, device=device)
    part = torch.searchsorted(bounds[1:], chunk, right=True)
    first, size = bounds[part], bounds.diff()[part]
    return (first * B + row * size + chunk - first) * H + torch.arange(H, device=device)[:, None]


def _few_lengths(count: int) -> int:
    """Rounds up to one of eight numbers between powers of two: a kernel is looked up for each length that comes up."""
    step = 1 << max(0, count.bit_length() - 4)
    return max(1, -(-count // step) * step)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkTraffic:
    """How many chunks come to a process in a step, on average, in the two ways to read chunks of others.

    Gathering brings the chunks of all rows to each process once, and their gradients back once. Travelling brings those
    that the process's tokens picked, at each retrieval, and their gradients back. It is counted as if tokens picked at
    random, which is the most that can be expected: neighbours pick alike.

    Attributes:
        parts: how many processes share each row.
        rows: how many rows they share.
        chunks: how many chunks a row has.
        picks: how many chunks the tokens of a process pick in one row, all together and with one head.
        retrievals: how often a forward pass picks.
        forwards, backwards: how often the layers run, and whether gradients are wanted.
        in_batch: whether tokens also pick chunks of the other rows.
    """

    parts: int
    rows: float
    chunks: int
    picks: int
    retrievals: int
    forwards: int = 1
    backwards: int = 1
    in_batch: bool = False

    @staticmethod
    def of(
        config: ModelConfig, *, parts: int, rows: float, places: int, forwards: int, backwards: int = 1,
        in_batch: bool = False,
    ) -> "ChunkTraffic":  # fmt: skip
        """Counts for a model and rows of so many places in its layers, the landmark tokens of DRT included."""
        choices = places // config.chunk_size if config.has_landmark_tokens else places  # DRT chooses once a chunk
        return ChunkTraffic(
            parts=parts,
            rows=rows,
            chunks=places // config.chunk_size,
            picks=choices // parts * config.top_k,
            retrievals=sum(spec.retrieves for spec in config.layers),
            forwards=forwards,
            backwards=backwards,
            in_batch=in_batch,
        )

    def travels(self, way: str) -> bool:
        """Says whether picked chunks travel in a way of `CHUNK_EXCHANGES`; `auto` takes what brings fewer of them."""
        return self.travelled < self.gathered if way == AUTO else way == TRAVEL

    @property
    def gathered(self) -> float:
        """How many chunks and gradients of chunks come where the chunks are gathered."""
        return (1 + self.backwards) * self.rows * self.chunks * (1 - 1 / self.parts)

    @property
    def travelled(self) -> float:
        """How many chunks and gradients of chunks come where picked ones travel."""
        return self.retrievals * (self.forwards + self.backwards) * self.fetched

    @property
    def fetched(self) -> float:
        """How many chunks of other processes come at one retrieval, in all rows together."""
        if self.in_batch:
            everywhere = self.rows * self.chunks
            return _distinct(everywhere, self.rows * self.picks) * (1 - 1 / self.parts)
        seen = [self.chunks * (part + 1) / self.parts for part in range(self.parts)]
        shares = (_distinct(each, self.picks) * part / (part + 1) for part, each in enumerate(seen))
        return self.rows * sum(shares) / self.parts

    @property
    def kept(self) -> float:
        """How many chunks the process that sees all of a row has after one retrieval, its own ones included."""
        if self.in_batch:
            return _distinct(self.rows * self.chunks, self.rows * self.picks)
        return self.rows * _distinct(self.chunks, self.picks)


def _distinct(things: float, picks: float) -> float:
    """Returns how many different ones of some things are expected among random picks."""
    return things * (1 - (1 - 1 / max(things, 1)) ** picks)
