"""`hsa_attention` as users call it: it checks its arguments, then PyTorch's dispatcher finds kernel and gradient."""

import torch
from torch import Tensor

from hsa_compile.checks import check_flag
from hsa_compile.errors import InvalidArgument
from hsa_compile.kernels.hsa_attention import dispatch as torch_ops


def global_indices(chunk_indices: Tensor, cu_seqlens: Tensor, kv_len: int, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Turns chunks of a token's own sequence into chunks of the whole batch, without waiting for the device.

    Args:
        chunk_indices: `[1, T, H, K]`, chunks of each token's own sequence; −1 is an empty slot.
        cu_seqlens: `[num_sequences + 1]`, the row where each sequence begins, and the end.
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
    torch_ops.check_cu_seqlens(cu_seqlens)
    if cu_seqlens.device != chunk_indices.device:
        raise InvalidArgument(f"cu_seqlens is on {cu_seqlens.device}, chunk_indices on {chunk_indices.device}")
    bounds = torch_ops.sequence_bounds(cu_seqlens, seq_len)
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


def hsa_attention(
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
    deterministic: bool = False,
) -> Tensor:
    """Computes hierarchical sparse attention over selected chunks, with the schedule that was tuned for this shape.

        o[t,h] = Σ_i  w[t,·,i] · softmax(scale · q[t,h] K_cᵀ) V_c        with c = chunk_indices[t, h // G, i]

    Each chunk is attended to on its own and the results are fused by weight. There is no causal mask inside:
    a token sees exactly the chunks in its slots. The result is differentiable in q, k, v and chunk_weights; q, k, v,
    indices and weights are all that is saved for backward. Under autocast, q, k and v are cast as for
    `scaled_dot_product_attention`: all but float64. q, k and v must be finite: a value that is not reaches the rows
    that pick it, and on a GPU it may reach their neighbours, which share a product with them.

    Args:
        q: `[B, T, HQ, D]`, float32, bfloat16 or float16; float64 on a CPU.
        k: `[B, S, H, D]`, dtype and device of q; `HQ` is a multiple of `H`, `D` at most 256. Chunk `c` is the
            rows `c·C … (c+1)·C − 1`; rows past the last whole chunk belong to none.
        v: `[B, S, H, Dv]`, dtype and device of q; `Dv` at most 256.
        chunk_indices: `[B, T, H, K]` int32 or int64, in any order; −1 is an empty slot; a chunk named twice
            counts twice. On a GPU a value outside −1 … S // C − 1 is taken as empty, since a check would have to wait
            for the device.
        chunk_weights: `[B, T, H, K]`, or `[B, T, HQ, K]` for a weight of its own for each query head; any
            float dtype, float32 by custom. Weights of empty slots are never read.
        chunk_size: `C`, keys in a chunk.
        scale: factor of the logits; `D ** -0.5` if None.
        softmax_off_by_one: adds 1 to each chunk's normaliser, so that a chunk may be ignored.
        mask_last_token: leaves out the last key of each chunk, a landmark.
        cu_seqlens: `[num_sequences + 1]` int32 or int64, the first row of each of several sequences packed into a
            batch of one with `T = S`, and the end. Chunks are counted from the beginning of a token's own sequence;
            a sequence's rows past its last whole chunk belong to none. A chunk that a token's sequence does not have
            is an empty slot, on a CPU too.
        deterministic: allows only schedules that give the same bits in every run; it is also switched on by
            `torch.use_deterministic_algorithms(True)`.

    Returns:
        o `[B, T, HQ, Dv]` in the dtype of q; zeros where all slots are empty.

    Raises:
        InvalidArgument: a shape, dtype, device or value is not allowed; the message shows it and what is allowed.

    Source: arXiv 2504.16795, section 3; softmax-off-by-one from arXiv 2410.01651.
    """
    check_flag("softmax_off_by_one", softmax_off_by_one)
    check_flag("mask_last_token", mask_last_token)
    check_flag("deterministic", deterministic)
    if isinstance(q, Tensor) and q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):
        q, k, v = _autocast(q.device.type, q, k, v)
    tensors = (q, k, v, chunk_indices, chunk_weights)
    # Only an int, since True and 1 are one key; and before indices are numbered over all sequences.
    if type(chunk_size) is not int or cu_seqlens is not None or not torch_ops.are_checked_below(*tensors):
        torch_ops.check_arguments(*tensors, chunk_size, mask_last_token)
    torch_ops.check_scale(scale)
    chunk_starts = None
    if cu_seqlens is not None:
        chunk_indices, chunk_starts = global_indices(chunk_indices, cu_seqlens, k.shape[1], chunk_size)
    if chunk_indices.numel() == 0 or q.numel() == 0 or k.shape[1] < chunk_size:
        torch_ops.check_arguments(*tensors, chunk_size, mask_last_token)
        if chunk_indices.numel() and chunk_indices.is_cpu and torch_ops.are_checked_below(chunk_indices):
            torch_ops.check_values(chunk_indices, None, k.shape[1], chunk_size)
        return _nothing_to_attend_to(q, k, v, chunk_weights)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return torch_ops.hsa_forward(
        q,
        k,
        v,
        chunk_indices,
        chunk_weights,
        chunk_starts,
        chunk_size,
        float(scale),
        softmax_off_by_one,
        mask_last_token,
        deterministic,
    )


def _autocast(device_type: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts tensors as autocast would; what is no tensor is left for the check to name."""
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )


def _nothing_to_attend_to(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    """Returns zeros that still belong to the graph, where there are no tokens, no slots or no whole chunk."""
    o = q.new_zeros(*q.shape[:3], v.shape[3])
    for x in (q, k, v, weights):
        o = o + 0 * x[:0].sum().to(q.dtype)
    return o
