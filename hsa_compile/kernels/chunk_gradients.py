"""Adds up the gradients of chunks, of which each worker of a CPU kernel has its own, to gradients of keys or values."""

import torch
from torch import Tensor


def add_chunk_gradients(
    x: Tensor, parts: list[tuple[int, Tensor]], chunk_size: int, chunk_starts: Tensor | None
) -> Tensor:
    """Adds the workers' parts in a fixed order, so that every run gives the same bits.

    Args:
        x: `[B, S, H, D]`, the keys or values.
        parts: for each worker its first (batch, kv head) pair and `[pairs, N·C, D]`, rows chunk by chunk.
        chunk_size: `C`.
        chunk_starts: `[N]`, the row where each chunk begins; `chunk · C` if None.

    Returns:
        the gradient of x, in its shape and dtype; rows that belong to no chunk are zero.
    """
    gradient = torch.zeros(x.shape, dtype=parts[0][1].dtype)
    num_kv_heads, whole = x.shape[2], parts[0][1].shape[1]
    if chunk_starts is not None:
        rows = (chunk_starts.long().unsqueeze(1) + torch.arange(chunk_size)).flatten()  # [N·C]
    for first_pair, part in parts:
        for i, one in enumerate(part):
            b, h = divmod(first_pair + i, num_kv_heads)
            if chunk_starts is None:
                gradient[b, :whole, h] += one
            else:
                gradient[b, :, h].index_add_(0, rows, one)  # starts of unused chunks repeat, with zeros
    return gradient.to(x.dtype)
