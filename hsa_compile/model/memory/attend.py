"""Attention to chosen chunks of the memory: they are brought together on the device, and the ops run on those alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hsa_compile.errors import InvalidArgument
from hsa_compile.kernels.hsa_attention.op import hsa_attention
from hsa_compile.kernels.hsa_decode.op import hsa_decode
from hsa_compile.model.memory.pages import PagePool
from hsa_compile.model.memory.shape import PageTable
from hsa_compile.problem import MAX_DECODE_TOKENS

GATHER_BYTES = 2**28  # how many bytes of chosen chunks are brought together at once


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendOptions:
    """What is passed on to the op; `hsa_attention` explains each."""

    scale: float | None
    softmax_off_by_one: bool
    mask_last_token: bool


def attend(
    pages: PagePool, table: PageTable, q: Tensor, chunk_indices: Tensor, chunk_weights: Tensor, options: AttendOptions
) -> Tensor:
    """Computes `ChunkMemory.attend`, in groups of tokens where all chunks that they could choose would be too much."""
    _check(pages, table, q, chunk_indices, chunk_weights)
    shape, (B, T), K = pages.shape, q.shape[:2], chunk_indices.shape[3]
    most = GATHER_BYTES * shape.num_kv_heads // shape.page_bytes  # chunks of one head
    tokens = T
    if pages.num_pages * shape.num_kv_heads > most:
        tokens = max(MAX_DECODE_TOKENS, most // max(1, B * shape.num_kv_heads * K))
    inputs = [x.split(max(1, tokens), dim=1) for x in (q, chunk_indices, chunk_weights)]
    return torch.cat([_attend(pages, table, x, i, w, options) for x, i, w in zip(*inputs, strict=True)], dim=1)


def _attend(
    pages: PagePool, table: PageTable, q: Tensor, chunk_indices: Tensor, chunk_weights: Tensor, options: AttendOptions
) -> Tensor:
    (B, T, HQ, _), H = q.shape, pages.shape.num_kv_heads
    found = table.lookup(chunk_indices.cpu())
    filled = found >= 0
    slots = (found * H + torch.arange(H).view(-1, 1))[filled]
    slots, order = slots.unique(return_inverse=True)
    if len(slots) == 0:
        return q.new_zeros(B, T, HQ, pages.shape.value_dim)
    # The length is rounded up to a power of two: each length is a kernel's shape, which is looked up once.
    k, v = (x.to(q.dtype) for x in pages.read(slots, 1 << (len(slots) - 1).bit_length()))
    indices = torch.full(found.shape, -1, dtype=torch.int32)
    indices[filled] = order.int()

    def by_head(x: Tensor) -> Tensor:
        """Turns `[B, T, H · n, …]` into `[B · H, T, n, …]`, so that a head that chose has its chunks to itself."""
        return x.unflatten(2, (H, -1)).transpose(1, 2).flatten(0, 1)

    queries, weights, indices = by_head(q), by_head(chunk_weights), by_head(indices.to(q.device))
    scale, off_by_one, mask = options.scale, options.softmax_off_by_one, options.mask_last_token
    if T <= MAX_DECODE_TOKENS:
        k, v = k.unsqueeze(1), v.unsqueeze(1)  # [pages, 1, C, D]
        o = hsa_decode(
            queries, k, v, indices, weights, scale=scale, softmax_off_by_one=off_by_one, mask_last_token=mask
        )
    else:
        queries, weights, indices = (x.flatten(0, 1).unsqueeze(0) for x in (queries, weights, indices))
        k, v = (x.flatten(0, 1)[None, :, None] for x in (k, v))  # [1, pages · C, 1, D]
        o = hsa_attention(
            queries,
            k,
            v,
            indices,
            weights,
            chunk_size=pages.shape.chunk_size,
            scale=scale,
            softmax_off_by_one=off_by_one,
            mask_last_token=mask,
        )
    return o.view(B, H, T, HQ // H, -1).transpose(1, 2).flatten(2, 3)


def _check(pages: PagePool, table: PageTable, q: Tensor, indices: Tensor, weights: Tensor) -> None:
    """Checks what the ops cannot, since they see less; they check the rest."""
    H, D, B = pages.shape.num_kv_heads, pages.shape.head_dim, len(table.counts)
    if q.dim() != 4 or q.shape[0] != B or q.shape[2] == 0 or q.shape[2] % H or q.shape[3] != D:
        raise InvalidArgument(f"q has shape {list(q.shape)}; [B, T, HQ, D] = [{B}, T, multiple of {H}, {D}] is needed")
    for name, x, heads in (("chunk_indices", indices, {H}), ("chunk_weights", weights, {H, q.shape[2]})):
        if x.dim() != 4 or x.shape[:2] != q.shape[:2] or x.shape[2] not in heads or x.shape[3] != indices.shape[3]:
            wanted = f"[{B}, {q.shape[1]}, {' or '.join(map(str, sorted(heads)))}, K]"
            raise InvalidArgument(f"{name} has shape {list(x.shape)}; {wanted} is needed")
    for name, x in (("q", q), ("chunk_indices", indices), ("chunk_weights", weights)):
        if x.device != pages.device:
            raise InvalidArgument(f"{name} is on {x.device}; the memory's device is {pages.device}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise InvalidArgument(f"chunk_indices has dtype {indices.dtype}; int32 or int64 is needed")
    if indices.numel() == 0:
        return
    low, high = (x.tolist() for x in indices.flatten(1).aminmax(dim=1))
    for b, count in enumerate(table.counts):
        if low[b] < -1 or high[b] >= count:
            value = low[b] if low[b] < -1 else high[b]
            raise InvalidArgument(f"chunk_indices of row {b} holds {value}; allowed are −1 (empty) … {count - 1}")
