"""The memory's side of a layer: the chunk encoder makes chunks, retrieval chooses some, HSAttention reads them.

`Memory` says what the last two ask of a memory, and `SequenceMemory` is the one for training.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsa_compile.kernels.hsa_attention.op import hsa_attention
from hsa_compile.kernels.select_chunks.op import select_chunks
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.layers.attention import GroupedQueryAttention, attend
from hsa_compile.model.layers.basic import RMSNorm, SwiGLU, rope_angles, rotate, without_cpu_autocast
from hsa_compile.model.layers.exchange import SharedRows
from hsa_compile.model.layers.picked_chunks import FetchedChunks, fetch_chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedChunks:
    """Chunks as the memory holds them.

    Attributes:
        k, v: `[..., C, H, D]`.
        landmarks: `[..., R, H, Dr]`.
    """

    k: Tensor
    v: Tensor
    landmarks: Tensor


class EncoderLayer(GroupedQueryAttention):
    """One bidirectional layer over a chunk, with biases on q, k and v as in the authors' code.

    Args:
        config: the config of the model that the layer belongs to.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, bias=True)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config.dim, config.encoder_ffn_dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Runs `x [n, L, dim]`, one chunk a row, through the layer; the shape stays."""
        q, k, v = self.project(self.norm(x))
        q, k = rotate(q, *rope), rotate(k, *rope)
        x = x + self.o_proj(attend(q, k, v).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class ChunkEncoder(nn.Module):
    """Encodes each chunk on its own (arXiv 2511.23319, section 3); positions restart in each.

    A learned CLS is appended to a chunk, and its output, through a linear layer, is the chunk's landmark. Keys (with QK
    norm) and values come from the outputs at the tokens. In DRT the chunk's last token is the landmark token and takes
    the place of the CLS. With `pooled_landmarks`, which are our own, the tokens' outputs pass another linear layer. The
    chunk is cut into as many parts as it has landmarks, and the maximum of each channel over a part is added to its
    landmark.

    Args:
        config: the config of the model that the encoder belongs to.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_kv_heads, self.head_dim = config.memory_kv_heads, config.memory_head_dim
        self.landmarks_per_chunk, self.retrieval_dim = config.landmarks_per_chunk, config.retrieval_dim
        self.encoder_head_dim = config.head_dim
        self.rope_theta = config.rope_theta
        self.cls = None if config.has_landmark_tokens else nn.Parameter(torch.zeros(config.dim))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.k_proj = nn.Linear(config.dim, config.memory_kv_heads * config.memory_head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.memory_kv_heads * config.memory_head_dim, bias=False)
        self.k_norm = RMSNorm(config.memory_head_dim, config.norm_eps)
        self.landmark_proj = nn.Linear(config.dim, config.memory_kv_heads * config.retrieval_dim, bias=False)
        self.token_proj = (
            nn.Linear(config.dim, config.memory_kv_heads * config.retrieval_dim, bias=False)
            if config.pooled_landmarks
            else None
        )
        self.landmark_norm = RMSNorm(config.retrieval_dim, config.norm_eps) if config.retrieval_norm else nn.Identity()

    def forward(self, chunks: Tensor) -> EncodedChunks:
        """Encodes `chunks [..., C, dim]`, outputs of the lower half, into keys, values and landmarks."""
        *shape, num_tokens, dim = chunks.shape
        x = chunks.reshape(math.prod(shape), num_tokens, dim)
        if self.cls is not None:
            x = torch.cat((x, self.cls.to(x.dtype).expand(x.shape[0], 1, dim)), dim=1)
        positions = torch.arange(x.shape[1], device=x.device)[None]
        rope = rope_angles(positions, self.encoder_head_dim, self.rope_theta, x.dtype)
        for layer in self.layers:
            x = layer(x, rope)
        x = self.norm(x)
        tokens = x[:, :num_tokens]
        landmarks = self.landmark_proj(x[:, -1:])
        if self.token_proj is not None:
            landmarks = landmarks + self.token_proj(tokens).unflatten(1, (self.landmarks_per_chunk, -1)).amax(dim=2)
        heads = (*shape, num_tokens, self.num_kv_heads, self.head_dim)
        landmarks = landmarks.view(*shape, self.landmarks_per_chunk, self.num_kv_heads, self.retrieval_dim)
        return EncodedChunks(
            k=self.k_norm(self.k_proj(tokens).view(heads)),
            v=self.v_proj(tokens).view(heads),
            landmarks=self.landmark_norm(landmarks),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The chunks that each token reads, and how much.

    Attributes:
        indices: `[B, T, H, K]` int32, −1 where a slot is empty.
        weights: `[B, T, H, K]`.
        fetched: the chunks themselves, where they lie with other processes.
        losses: `[B, T]`, what `SequenceMemory.source_losses` returns, where sources were given.
    """

    indices: Tensor
    weights: Tensor
    fetched: FetchedChunks | None = None
    losses: Tensor | None = None


class Memory(Protocol):
    """What retrieval and HSAttention ask of a memory: `SequenceMemory` in training, `ChunkMemory` in inference."""

    def select(
        self, query: Tensor, positions: list[int], *, top_k: int, fusion: str, once_a_chunk: bool
    ) -> tuple[Tensor, Tensor]:
        """Returns the best chunks that are complete at each token, as (indices, weights) `[B, T, H, K]`.

        With `once_a_chunk`, query row t is the last token of chunk `position + t`, which sees the chunks before.
        """

    def attend(
        self, q: Tensor, indices: Tensor, weights: Tensor, *, softmax_off_by_one: bool, mask_last_token: bool
    ) -> Tensor:
        """Returns what the tokens read from their chunks, `[B, T, HQ, D]`."""


class SequenceMemory:
    """The chunks of the sequences that are being trained on; gradients reach them.

    Args:
        chunks: k, v `[B, N, C, H, D]` and landmarks `[B, N, R, H, Dr]`.
        in_batch: whether each sequence also sees the chunks of all others, as if they were text before it. A model that
            finds a chunk among B · N in training finds it in a longer text.
        owners: the parts of the chunks that processes hold, where k and v are those of the own part alone; each
            selection must be given to `fetch` then. None if all are here.
    """

    def __init__(self, chunks: EncodedChunks, *, in_batch: bool = False, owners: SharedRows | None = None) -> None:
        batch, num_chunks = chunks.landmarks.shape[:2]
        self.chunk_size, self._owners = chunks.k.shape[2], owners
        k, v, landmarks = chunks.k, chunks.v, chunks.landmarks
        self._num_others = (batch - 1) * num_chunks if in_batch else 0
        if self._num_others:
            landmarks = _others_first(landmarks)
            if owners is None:
                k, v = _others_first(k), _others_first(v)
        self.k, self.v, self.landmarks = k, v, landmarks

    def select(
        self,
        query: Tensor,
        positions: list[int],
        *,
        top_k: int,
        fusion: str,
        once_a_chunk: bool,
        noise_seed: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Selects as `Memory.select` does, with Gumbel noise on the choice if there is a seed."""
        assert len(set(positions)) == 1, "all training sequences begin at one place"
        chunk_size = 1 if once_a_chunk else self.chunk_size
        context, (query, landmarks) = without_cpu_autocast(query, self.landmarks)
        with context:
            return select_chunks(
                query,
                landmarks,
                chunk_size=chunk_size,
                top_k=top_k,
                offset=self._num_others * chunk_size + positions[0],
                fusion=fusion,
                noise_seed=noise_seed,
            )

    def source_losses(self, query: Tensor, sources: Tensor, position: int) -> Tensor:
        """Returns the cross entropy of landmark scores against the chunk that holds each token's source.

        As dense retrievers are trained (arXiv 2004.04906), the other chunks are those of all rows, but for the own ones
        that a token does not see yet.

        Args:
            query: `[B, T, H, Dr]`.
            sources: `[B, T]`, the place of a source in its row, −1 for none.
            position: where the first token stands.

        Returns:
            `[B, T]`, float32 at least, the mean over H; 0 where there is no source, or where its chunk is not complete.
        """
        context, (query, landmarks) = without_cpu_autocast(query, self.landmarks[:, self._num_others :])
        rows, num_chunks = landmarks.shape[:2]
        chunk = sources.div(self.chunk_size, rounding_mode="floor")
        seen = (position + torch.arange(sources.shape[1], device=sources.device)) // self.chunk_size
        row, token = ((chunk >= 0) & (chunk < seen)).nonzero(as_tuple=True)
        with context:
            scores = torch.einsum("phd,bnrhd->phbnr", query[row, token], landmarks).amax(-1)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        own = torch.arange(rows, device=row.device) == row[:, None]
        coming = torch.arange(num_chunks, device=row.device) >= seen[token, None]
        scores = scores.masked_fill((own[:, :, None] & coming[:, None])[:, None], -math.inf)
        heads = scores.shape[1]
        right = (row * num_chunks + chunk[row, token]).repeat_interleave(heads)
        losses = F.cross_entropy(scores.flatten(2).flatten(0, 1), right, reduction="none")
        return losses.new_zeros(sources.shape).index_put((row, token), losses.unflatten(0, (-1, heads)).mean(1))

    def fetch(self, selection: Selection) -> Selection:
        """Adds the chunks of a selection to it where processes hold parts of them; all of these call it together."""
        if self._owners is None:
            return selection
        context, (k, v) = without_cpu_autocast(self.k, self.v)
        with context:
            fetched = fetch_chunks(k, v, selection.indices, self._owners, in_batch=self._num_others > 0)
        return replace(selection, fetched=fetched)

    def attend(
        self, q: Tensor, indices: Tensor, weights: Tensor, *, softmax_off_by_one: bool, mask_last_token: bool
    ) -> Tensor:
        """Reads as `Memory.attend` does."""
        context, (q, k, v) = without_cpu_autocast(q, self.k, self.v)
        with context:
            return hsa_attention(
                q,
                k.flatten(1, 2),
                v.flatten(1, 2),
                indices,
                weights,
                chunk_size=self.chunk_size,
                softmax_off_by_one=softmax_off_by_one,
                mask_last_token=mask_last_token,
            )


def _others_first(x: Tensor) -> Tensor:
    """Puts before what each row has, `[B, N, …]`, what all others have, from the next row on: `[B, B · N, …]`."""
    return torch.cat([x.roll(shift, dims=0) for shift in range(x.shape[0] - 1, -1, -1)], dim=1)


class Retrieval(nn.Module):
    """Chooses chunks by the scores of landmarks: once a token, or in DRT once a chunk.

    The query is a linear function of RMSNorm(h), with one retrieval head for each kv head of the memory.

    Args:
        config: the config of the model that the layer belongs to.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.retrieval_dim = config.memory_kv_heads, config.retrieval_dim
        self.top_k, self.fusion, self.scale = config.top_k, config.fusion, config.retrieval_scale
        self.chunk_size = config.chunk_size
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.q_proj = nn.Linear(config.dim, self.num_heads * self.retrieval_dim, bias=False)
        self.q_norm = RMSNorm(self.retrieval_dim, config.norm_eps) if config.retrieval_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        memory: Memory,
        positions: list[int],
        noise_seed: int | None = None,
        sources: Tensor | None = None,
    ) -> Selection:
        """Chooses the chunks for each token of `x [B, T, dim]`, whose rows begin at `positions`.

        With `sources [B, T]`, the selection has the losses of `SequenceMemory.source_losses`.
        """
        return self._select(x, memory, positions, noise_seed, once_a_chunk=False, sources=sources)

    def once_a_chunk(
        self,
        x: Tensor,
        memory: Memory,
        position: int,
        carried: Selection | None,
        noise_seed: int | None = None,
        shared: SharedRows | None = None,
    ) -> tuple[Selection, Selection]:
        """Chooses as DRT does: the last token of a chunk, its landmark token, chooses for all tokens of the next chunk.

        Args:
            x: `[B, T, dim]`; all rows begin at `position`.
            memory: the memory to choose from; chunk c sees chunks up to c − 2.
            position: where the first token stands.
            carried: what was chosen for the chunk that `x` begins in; None at the beginning of a text.
            noise_seed: the seed of the Gumbel noise, or None for no noise.
            shared: the part of the rows that `x` is, where processes share them: the part before has chosen then.

        Returns:
            the selection for the tokens of `x`, and for the first token after them.
        """
        C, T = self.chunk_size, x.shape[1]
        first = position // C
        end = (first + 1) * C - 1 - position
        ends = torch.arange(end, max(end, T), C, device=x.device)
        chosen = self._select(x[:, ends], memory, [first] * x.shape[0], noise_seed, once_a_chunk=True)
        if shared is not None:
            chunks = shared.in_units(C)
            carried = Selection(
                indices=chunks.before(chosen.indices + 1, 1) - 1,  # nothing before the row's first chunk: -1
                weights=chunks.before(chosen.weights, 1),
            )
        elif carried is None:
            shape = (x.shape[0], 1, self.num_heads, self.top_k)
            carried = Selection(indices=chosen.indices.new_full(shape, -1), weights=chosen.weights.new_zeros(shape))
        indices = torch.cat((carried.indices, chosen.indices), dim=1)
        weights = torch.cat((carried.weights, chosen.weights), dim=1)
        chunk = (position + torch.arange(T + 1, device=x.device)) // C - first
        now, after = chunk[:-1], chunk[-1:]
        return (
            Selection(indices=indices[:, now], weights=weights[:, now]),
            Selection(indices=indices[:, after], weights=weights[:, after]),
        )

    def _select(
        self,
        x: Tensor,
        memory: Memory,
        positions: list[int],
        noise_seed: int | None,
        *,
        once_a_chunk: bool,
        sources: Tensor | None = None,
    ) -> Selection:
        query = self.q_norm(self.q_proj(self.norm(x)).view(*x.shape[:2], self.num_heads, self.retrieval_dim))
        query = query * self.scale
        select = memory.select
        if noise_seed is not None:
            assert isinstance(memory, SequenceMemory), "noise is for training"
            select = functools.partial(memory.select, noise_seed=noise_seed)
        indices, weights = select(query, positions, top_k=self.top_k, fusion=self.fusion, once_a_chunk=once_a_chunk)
        losses = None
        if sources is not None:
            assert isinstance(memory, SequenceMemory), "sources are known in training"
            losses = memory.source_losses(query, sources, positions[0])
        return Selection(indices=indices, weights=weights, losses=losses)


class HSAttention(nn.Module):
    """Hierarchical sparse attention to the memory, without position encoding, with QK norm (arXiv 2511.23319).

    Args:
        config: the config of the model that the layer belongs to.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.memory_heads, config.memory_head_dim
        self.softmax_off_by_one = config.reads_off_by_one
        self.mask_last_token = config.has_landmark_tokens
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.q_proj = nn.Linear(config.dim, self.num_heads * self.head_dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, memory: Memory, selection: Selection) -> Tensor:
        """Returns what the tokens of `x [B, T, dim]` read from their chunks, `[B, T, dim]`, without the residual."""
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(self.norm(x)).view(B, T, self.num_heads, self.head_dim))
        source: Memory | FetchedChunks = memory
        indices = selection.indices
        if selection.fetched is not None:
            source, indices = selection.fetched, selection.fetched.indices
        o = source.attend(
            q,
            indices,
            selection.weights,
            softmax_off_by_one=self.softmax_off_by_one,
            mask_last_token=self.mask_last_token,
        )
        return self.o_proj(o.reshape(B, T, self.num_heads * self.head_dim))
