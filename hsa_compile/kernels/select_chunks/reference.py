"""The definition of `select_chunks` in plain PyTorch; it computes dense scores, so it is for small shapes."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from hsa_compile.kernels.gumbel import gumbel, noise_keys


def select_chunks_reference(
    query: Tensor,
    landmarks: Tensor,
    *,
    chunk_size: int,
    top_k: int,
    offset: int = 0,
    fusion: str = "softmax",
    noise_seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Selects the `top_k` chunks that score highest for each token, most recent first, and their weights.

    Chunk `i` is visible to row `t`, at position `offset + t`, iff `offset + t ≥ (i + 1)·C`. Its score is
    `query · landmark / √Dr`, the largest of these if it has several landmarks; of equal ones the lower chunk wins. The
    weights are differentiable in query and landmarks, in any float dtype (float64 for checks), on any device.

    Args:
        query: `[B, T, H, Dr]`.
        landmarks: `[B, N, H, Dr]`, or `[B, N, R, H, Dr]` for R landmarks a chunk.
        chunk_size: `C`, keys in a chunk.
        top_k: `K`, chunks to pick for each token.
        offset: the position of the first query row.
        fusion: `softmax` over the K scores, or `stick_breaking` from the most recent chunk on.
        noise_seed: the seed of Gumbel noise that is added to the scores for the comparison alone; None for no noise.

    Returns:
        chunk_indices `[B, T, H, K]` int32 in falling order, −1 where fewer than K chunks are visible, and
        chunk_weights `[B, T, H, K]` in the dtype of query, 0 there.

    Source: arXiv 2504.16795 (stick-breaking), arXiv 2511.23319 (softmax, Gumbel noise).
    """
    (batch, seq_len, num_heads, _), num_chunks = query.shape, landmarks.shape[1]
    positions = torch.arange(seq_len, device=query.device) + offset
    chunks = torch.arange(num_chunks, device=query.device)
    scores = _scores(query.detach(), _several(landmarks).detach())  # [B, T, H, N]
    if noise_seed is not None:
        keys = noise_keys(noise_seed, batch, num_heads, positions)
        scores = scores + gumbel(keys.unsqueeze(-1), chunks)
    visible = (positions[:, None] >= (chunks + 1) * chunk_size).view(1, seq_len, 1, num_chunks)
    scores = scores.masked_fill(~visible, float("-inf"))
    best, order = scores.sort(dim=-1, descending=True, stable=True)
    picks = torch.where(best == float("-inf"), -1, order)[..., :top_k]
    picks = torch.nn.functional.pad(picks, (0, top_k - picks.shape[-1]), value=-1)
    indices = picks.sort(dim=-1, descending=True).values.to(torch.int32)
    return indices, select_weights_reference(query, landmarks, indices, fusion=fusion)


def select_weights_reference(query: Tensor, landmarks: Tensor, chunk_indices: Tensor, *, fusion: str) -> Tensor:
    """Computes the weights of chunks that were picked: `[B, T, H, K]` in the dtype of query, differentiable.

    Args:
        query: `[B, T, H, Dr]`.
        landmarks: `[B, N, H, Dr]`, or `[B, N, R, H, Dr]`.
        chunk_indices: `[B, T, H, K]`, most recent first; −1 is an empty slot.
        fusion: `softmax` or `stick_breaking`.
    """
    filled = chunk_indices >= 0
    if landmarks.shape[1] == 0:
        return query.new_zeros(chunk_indices.shape) + 0 * (query.sum() + landmarks.sum())
    b = torch.arange(query.shape[0], device=query.device).view(-1, 1, 1, 1)
    h = torch.arange(query.shape[2], device=query.device).view(1, 1, -1, 1)
    picked = _several(landmarks).transpose(2, 3)[b, chunk_indices.clamp(min=0).long(), h]  # [B, T, H, K, R, Dr]
    picked = picked.masked_fill(~filled.unsqueeze(-1).unsqueeze(-1), 0)
    scores = torch.einsum("bthd,bthkrd->bthkr", query, picked).max(-1).values * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~filled, 0)  # what is in an empty slot, and in a query without picks, goes nowhere
    if fusion == "softmax":
        # A row without picks gets a finite score, and then a weight of zero: no NaN on the way back.
        scores = scores.masked_fill(~filled & filled.any(dim=-1, keepdim=True), float("-inf"))
        return scores.softmax(dim=-1).masked_fill(~filled, 0)
    passed_on = logsigmoid(-scores)  # log(1 − σ)
    before = torch.cat([torch.zeros_like(scores[..., :1]), passed_on[..., :-1].cumsum(dim=-1)], dim=-1)
    return (logsigmoid(scores) + before).exp().masked_fill(~filled, 0)


def _scores(query: Tensor, landmarks: Tensor) -> Tensor:
    return torch.einsum("bthd,bnrhd->bthnr", query, landmarks).amax(-1) * query.shape[-1] ** -0.5


def _several(landmarks: Tensor) -> Tensor:
    """Returns landmarks `[B, N, H, Dr]` as one for each chunk, `[B, N, 1, H, Dr]`, and several as they are."""
    return landmarks if landmarks.dim() == 5 else landmarks.unsqueeze(2)
