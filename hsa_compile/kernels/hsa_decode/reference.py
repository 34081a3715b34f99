"""The definition of `hsa_decode` in plain PyTorch, which every kernel is checked against."""

import torch
from torch import Tensor


def hsa_decode_reference(
    q: Tensor,
    k_chunks: Tensor,
    v_chunks: Tensor,
    chunk_indices: Tensor,
    chunk_weights: Tensor,
    *,
    page_table: Tensor | None = None,
    scale: float | None = None,
    softmax_off_by_one: bool = False,
    mask_last_token: bool = False,
) -> Tensor:
    """Computes hierarchical sparse attention of a few tokens over chunks that lie in pages.

        o[t,h] = Σ_i  w[t,·,i] · softmax(scale · q[t,h] K_pᵀ) V_p        with p the page of chunk_indices[t, h // G, i]

    It works in any float dtype (float64 for checks), on any device.

    Args:
        q: `[B, T, HQ, D]`.
        k_chunks: `[P, H, C, D]`, one chunk a page.
        v_chunks: `[P, H, C, Dv]`.
        chunk_indices: `[B, T, H, K]` integers, pages if there is no table; a value out of range is an empty slot.
        chunk_weights: `[B, T, H or HQ, K]`.
        page_table: `[B, N]`, the page of each chunk of a sequence; a value out of range is no page.
        scale: factor of the logits; `D ** -0.5` if None.
        softmax_off_by_one: adds 1 to each chunk's normaliser, so that a chunk may be ignored.
        mask_last_token: leaves out the last key of each chunk, a landmark.

    Returns:
        o `[B, T, HQ, Dv]`; zeros where all slots are empty.

    Source: that of `hsa_attention_reference`.
    """
    batch, _, num_heads, head_dim = q.shape
    num_pages, num_kv_heads, chunk_size, value_dim = v_chunks.shape
    group, scale = num_heads // num_kv_heads, head_dim**-0.5 if scale is None else scale
    pages = chunk_indices.long()
    if page_table is not None:
        listed = (pages >= 0) & (pages < page_table.shape[1])
        b = torch.arange(batch, device=q.device).view(-1, 1, 1, 1)
        extended = torch.cat([page_table.long(), page_table.new_full((batch, 1), -1).long()], dim=1)
        pages = extended[b, torch.where(listed, pages, page_table.shape[1])]
    filled = (pages >= 0) & (pages < num_pages)  # [B, T, H, K]
    if not filled.any():
        return q.new_zeros(*q.shape[:3], value_dim)

    h = torch.arange(num_kv_heads, device=q.device).view(1, 1, -1, 1)
    empty = ~filled.unsqueeze(-1).unsqueeze(-1)
    index = torch.where(filled, pages, 0)
    k_picked = k_chunks[index, h].masked_fill(empty, 0)  # [B, T, H, K, C, D]
    v_picked = v_chunks[index, h].masked_fill(empty, 0)  # [B, T, H, K, C, Dv]
    if mask_last_token:
        k_picked, v_picked = k_picked[..., : chunk_size - 1, :], v_picked[..., : chunk_size - 1, :]
    logits = scale * torch.einsum("bthgd,bthkcd->bthgkc", q.unflatten(2, (num_kv_heads, group)), k_picked)
    logits = logits.masked_fill(empty.squeeze(-1).unsqueeze(3), 0)  # [B, T, H, G, K, C]
    if softmax_off_by_one:
        logits = torch.cat([logits, torch.zeros_like(logits[..., :1])], dim=-1)
    attention = logits.softmax(dim=-1)[..., : v_picked.shape[4]]  # [B, T, H, G, K, C]

    if chunk_weights.shape[2] != num_heads:
        chunk_weights = chunk_weights.repeat_interleave(group, dim=2)  # [B, T, HQ, K]
    weights = chunk_weights.unflatten(2, (num_kv_heads, group)).to(q.dtype)  # [B, T, H, G, K]
    weights = torch.where(filled.unsqueeze(3), weights, 0)  # the weight of an empty slot is never read
    return torch.einsum("bthgk,bthgkc,bthkcd->bthgd", weights, attention, v_picked).flatten(2, 3)
