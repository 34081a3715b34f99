"""The definition of `hsa_attention` in plain PyTorch, which every kernel is checked against."""

import itertools

import torch
from torch import Tensor


def hsa_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_indices: Tensor,
    chunk_weights: Tensor,
    *,
    chunk_size: int,
    scale: float | None = None,
    softmax_off_by_one: bool = False,
    mask_last_token: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Computes hierarchical sparse attention: each chunk is attended to on its own, and weights fuse the results.

        o[t,h] = Σ_i  w[t,·,i] · softmax(scale · q[t,h] K_cᵀ) V_c        with c = chunk_indices[t, h // G, i]

    The result is differentiable, in any float dtype (float64 for checks), on any device. Chunks are gathered for each
    token, so this is for small shapes.

    Args:
        q: `[B, T, HQ, D]`.
        k: `[B, S, H, D]`; chunk `c` is the rows `c·C … (c+1)·C − 1`; rows past the last whole chunk belong to none.
        v: `[B, S, H, Dv]`.
        chunk_indices: `[B, T, H, K]` integers in any order; −1 is an empty slot; a chunk named twice counts twice.
        chunk_weights: `[B, T, H or HQ, K]`.
        chunk_size: `C`, keys in a chunk.
        scale: factor of the logits; `D ** -0.5` if None.
        softmax_off_by_one: adds 1 to each chunk's normaliser, so that a chunk may be ignored.
        mask_last_token: leaves out the last key of each chunk, a landmark.
        cu_seqlens: `[num_sequences + 1]`, the row where each of several sequences packed into a batch of one begins,
            and the end; chunks are counted from the beginning of a token's own sequence.

    Returns:
        o `[B, T, HQ, Dv]`; zeros where all slots are empty.

    Source: arXiv 2504.16795, equations of section 3; softmax-off-by-one as in arXiv 2410.01651.
    """
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        parts = [
            hsa_attention_reference(
                *(x[:, first:last] for x in (q, k, v, chunk_indices, chunk_weights)),
                chunk_size=chunk_size,
                scale=scale,
                softmax_off_by_one=softmax_off_by_one,
                mask_last_token=mask_last_token,
            )
            for first, last in itertools.pairwise(bounds)
        ]
        return torch.cat(parts, dim=1)
    batch, seq_len, num_heads, head_dim = q.shape
    kv_len, num_kv_heads, value_dim = k.shape[1], k.shape[2], v.shape[3]
    group, num_chunks = num_heads // num_kv_heads, kv_len // chunk_size
    scale = head_dim**-0.5 if scale is None else scale
    if num_chunks == 0:
        return q.new_zeros(batch, seq_len, num_heads, value_dim) + 0 * (q.sum() + k.sum() + v.sum())

    whole = num_chunks * chunk_size
    k_chunks = k[:, :whole].unflatten(1, (num_chunks, chunk_size)).permute(0, 3, 1, 2, 4)  # [B, H, N, C, D]
    v_chunks = v[:, :whole].unflatten(1, (num_chunks, chunk_size)).permute(0, 3, 1, 2, 4)  # [B, H, N, C, Dv]

    filled = (chunk_indices >= 0).movedim(1, 2)  # [B, H, T, K]
    index = chunk_indices.clamp(min=0).long().movedim(1, 2)  # [B, H, T, K]
    b = torch.arange(batch, device=q.device).view(-1, 1, 1, 1)
    h = torch.arange(num_kv_heads, device=q.device).view(1, -1, 1, 1)
    empty = ~filled.unsqueeze(-1).unsqueeze(-1)
    k_picked = k_chunks[b, h, index].masked_fill(empty, 0)  # [B, H, T, K, C, D]
    v_picked = v_chunks[b, h, index].masked_fill(empty, 0)  # [B, H, T, K, C, Dv]
    if mask_last_token:
        k_picked, v_picked = k_picked[..., : chunk_size - 1, :], v_picked[..., : chunk_size - 1, :]

    q_grouped = q.unflatten(2, (num_kv_heads, group)).movedim(1, 2)  # [B, H, T, G, D]
    logits = scale * torch.einsum("bhtgd,bhtkcd->bhtgkc", q_grouped, k_picked)
    logits = logits.masked_fill(empty.squeeze(-1).unsqueeze(3), 0)  # [B, H, T, G, K, C]
    if softmax_off_by_one:
        logits = torch.cat([logits, torch.zeros_like(logits[..., :1])], dim=-1)
    attention = logits.softmax(dim=-1)[..., : v_picked.shape[4]]  # [B, H, T, G, K, C]

    if chunk_weights.shape[2] != num_heads:
        chunk_weights = chunk_weights.repeat_interleave(group, dim=2)  # [B, T, HQ, K]
    weights = chunk_weights.unflatten(2, (num_kv_heads, group)).movedim(1, 2)  # [B, H, T, G, K]
    weights = torch.where(filled.unsqueeze(3), weights.to(q.dtype), 0)  # the weight of an empty slot is never read
    o = torch.einsum("bhtgk,bhtgkc,bhtkcd->bhtgd", weights, attention, v_picked)
    return o.movedim(2, 1).flatten(2, 3)  # [B, T, HQ, Dv]
