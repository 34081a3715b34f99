"""Several sequences in a batch of one: chunks counted within each sequence, and their place in the whole."""

import torch
from torch import Tensor

from hsa_compile.errors import InvalidArgument


def global_indices(chunk_indices: Tensor, cu_seqlens: Tensor, kv_len: int, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Turns chunks of a token's own sequence into chunks of the whole, without asking the device anything.

    Args:
        chunk_indices: `[1, T, H, K]`, chunks of each token's own sequence; −1 is an empty slot.
        cu_seqlens: `[num_sequences + 1]`, where each sequence begins, and the end.
        kv_len: `S`, equal to `T`.
        chunk_size: `C`.

    Returns:
        chunk_indices `[1, T, H, K]` numbered over all sequences, −1 where a sequence has no such chunk; and
        chunk_starts `[S // C]` int32, the first row of each chunk; entries of chunks that do not exist are 0.

    Raises:
        InvalidArgument: the batch is not one, the lengths differ, or cu_seqlens does not rise from 0 to T.
    """
    batch, seq_len = chunk_indices.shape[:2]
    if batch != 1 or seq_len != kv_len:
        raise InvalidArgument(f"cu_seqlens needs a batch of 1 and T = S; B = {batch}, T = {seq_len}, S = {kv_len}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise InvalidArgument(
            f"cu_seqlens has shape {list(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; "
            "[num_sequences + 1] of int32 or int64 is needed"
        )
    if cu_seqlens.device != chunk_indices.device:
        raise InvalidArgument(f"cu_seqlens is on {cu_seqlens.device}, chunk_indices on {chunk_indices.device}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_bounds(cu_seqlens, seq_len)
    bounds = cu_seqlens.long()
    num_chunks = bounds.diff() // chunk_size  # [num_sequences]
    chunks_until = num_chunks.cumsum(0)
    first_chunk = chunks_until - num_chunks

    sequence = torch.searchsorted(bounds[1:].contiguous(), torch.arange(seq_len, device=bounds.device), right=True)
    sequence = sequence.clamp(max=num_chunks.numel() - 1)  # [T]
    exists = (chunk_indices >= 0) & (chunk_indices < num_chunks[sequence].view(1, -1, 1, 1))
    numbered = torch.where(exists, chunk_indices + first_chunk[sequence].view(1, -1, 1, 1), -1)

    chunk = torch.arange(kv_len // chunk_size, device=bounds.device)  # as many as there can be
    owner = torch.searchsorted(chunks_until, chunk, right=True).clamp(max=num_chunks.numel() - 1)
    starts = bounds[owner] + (chunk - first_chunk[owner]) * chunk_size
    starts = torch.where(chunk < chunks_until[-1], starts, 0)
    return numbered.to(torch.int32), starts.to(torch.int32)


def _check_bounds(cu_seqlens: Tensor, seq_len: int) -> None:
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != seq_len or bounds != sorted(bounds):
        raise InvalidArgument(f"cu_seqlens = {bounds} must rise from 0 to T = {seq_len}")
