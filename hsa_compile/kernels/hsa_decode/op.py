"""`hsa_decode` as users call it: it checks its arguments, then PyTorch's dispatcher finds the tuned kernel."""

from torch import Tensor

from hsa_compile.checks import check_flag
from hsa_compile.kernels.hsa_attention.dispatch import are_checked_below, check_scale
from hsa_compile.kernels.hsa_decode import dispatch as decode_ops


def hsa_decode(
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
    """Computes hierarchical sparse attention of the newest token or few over chunks in pages, for inference.

        o[t,h] = Σ_i  w[t,·,i] · softmax(scale · q[t,h] K_pᵀ) V_p        with p the page of chunk_indices[t, h // G, i]

    The maths is that of `hsa_attention`; a page holds one chunk. Only pages that are picked are read. On a GPU a call
    is two launches at most, its grid depends on shapes alone, and nothing waits for the device: after a first call,
    which compiles, it can be captured into a CUDA graph. There it allocates at most 16 float32 copies of o.
    Autocast casts nothing here, since that would copy all pages.

    Args:
        q: `[B, T, HQ, D]`, float32, bfloat16 or float16; float64 on a CPU; `T` is at most 16.
        k_chunks: `[P, H, C, D]`, dtype of q; `HQ` is a multiple of `H`, `D` at most 256. A page `[H, C, D]` is
            contiguous; pages may lie any number of rows apart, and are never copied. They are on the device of q, or,
            for q on a GPU, in pinned memory of the CPU, from which kernels read picked pages directly.
        v_chunks: `[P, H, C, Dv]`, as k_chunks; `Dv` at most 256.
        chunk_indices: `[B, T, H, K]` int32 or int64, in any order: pages 0 … P − 1, or, with a page table, chunks
            0 … N − 1 of the token's own sequence. Any other value, −1 by custom, is an empty slot; a chunk named
            twice counts twice.
        chunk_weights: `[B, T, H, K]`, or `[B, T, HQ, K]` for a weight of its own for each query head; any float
            dtype. Weights of empty slots are never read.
        page_table: `[B, N]` int32 or int64, the page of each chunk of a sequence. A value outside 0 … P − 1, −1 by
            custom, is no page, and makes a slot that picks it empty.
        scale: factor of the logits; `D ** -0.5` if None.
        softmax_off_by_one: adds 1 to each chunk's normaliser, so that a chunk may be ignored.
        mask_last_token: leaves out the last key of each chunk, a landmark.

    Returns:
        o `[B, T, HQ, Dv]` in the dtype of q; zeros where all slots are empty.

    Raises:
        InvalidArgument: a shape, dtype, device or value is not allowed; the message shows it and what is allowed.
            Also if a gradient is asked for, when it is computed.

    Source: arXiv 2504.16795, section 3; softmax-off-by-one from arXiv 2410.01651.
    """
    check_flag("softmax_off_by_one", softmax_off_by_one)
    check_flag("mask_last_token", mask_last_token)
    tensors = (q, k_chunks, v_chunks, chunk_indices, chunk_weights)
    if not are_checked_below(*tensors, *(() if page_table is None else (page_table,))):
        decode_ops.check_arguments(*tensors, page_table, mask_last_token)
    check_scale(scale)
    no_chunks = k_chunks.shape[0] == 0 or (page_table is not None and page_table.shape[1] == 0)
    if chunk_indices.numel() == 0 or q.numel() == 0 or no_chunks:
        decode_ops.check_arguments(*tensors, page_table, mask_last_token)
        return q.new_zeros(*q.shape[:3], v_chunks.shape[3])
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return decode_ops.hsa_decode(
        q,
        k_chunks,
        v_chunks,
        chunk_indices,
        chunk_weights,
        page_table,
        float(scale),
        softmax_off_by_one,
        mask_last_token,
    )
