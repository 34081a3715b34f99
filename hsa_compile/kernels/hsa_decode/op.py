"""`hsa_decode` as users call it: it checks its arguments, then PyTorch's dispatcher finds the tuned kernel."""

import math

import torch
from torch import Tensor

from hsa_compile.errors import InvalidArgument
from hsa_compile.kernels.hsa_attention.dispatch import DEVICE_TYPES, DTYPE_NAMES
from hsa_compile.kernels.hsa_decode import dispatch as decode_ops
from hsa_compile.problem import DTYPES, MAX_CHUNK_SIZE, MAX_DECODE_TOKENS, MAX_HEAD_DIM


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
        o `[B, T, HQ, Dv]` in the dtype of q, with no gradient; zeros where all slots are empty.

    Raises:
        InvalidArgument: a shape, dtype, device or value is not allowed, or a tensor requires a gradient while
            gradients are recorded; the message shows it and what is allowed.

    Source: arXiv 2504.16795, section 3; softmax-off-by-one from arXiv 2410.01651.
    """
    _check(q, k_chunks, v_chunks, chunk_indices, chunk_weights, mask_last_token)
    if page_table is not None:
        _check_page_table(page_table, q)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    elif not isinstance(scale, int | float) or not math.isfinite(scale):
        raise InvalidArgument(f"scale = {scale!r} must be a finite number, or None for D ** -0.5")
    no_chunks = k_chunks.shape[0] == 0 or (page_table is not None and page_table.shape[1] == 0)
    if chunk_indices.numel() == 0 or q.numel() == 0 or no_chunks:
        return q.new_zeros(*q.shape[:3], v_chunks.shape[3])
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


def _check(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor, mask_last_token: bool) -> None:
    tensors = (("q", q), ("k_chunks", k), ("v_chunks", v), ("chunk_indices", indices), ("chunk_weights", weights))
    for name, x in tensors:
        if not isinstance(x, Tensor):
            raise InvalidArgument(f"{name} is a {type(x).__name__}, not a tensor")
        if x.dim() != 4:
            raise InvalidArgument(f"{name} has shape {list(x.shape)}; four dimensions are needed")
        in_host_memory = name in ("k_chunks", "v_chunks") and q.device.type == "cuda" and x.device.type == "cpu"
        if x.device != q.device and not in_host_memory:
            raise InvalidArgument(f"{name} is on {x.device}, q on {q.device}; all must be on one device")
        if x.requires_grad and torch.is_grad_enabled():
            raise InvalidArgument(
                f"{name} requires a gradient and hsa_decode has none; use hsa_attention, or torch.no_grad()"
            )
    if q.device.type not in DEVICE_TYPES:
        raise InvalidArgument(f"device '{q.device}' is not supported; supported are cpu and cuda (NVIDIA or AMD)")
    for name, x in tensors[:3]:
        if x.dtype not in DTYPE_NAMES or x.dtype != q.dtype:
            raise InvalidArgument(
                f"{name} has dtype {x.dtype}; q, k_chunks and v_chunks must share one of {', '.join(DTYPES)}"
            )
    _check_shapes(q, k, v, indices, weights, mask_last_token)
    if indices.dtype not in (torch.int32, torch.int64):
        raise InvalidArgument(f"chunk_indices has dtype {indices.dtype}; int32 or int64 is needed")
    if not weights.is_floating_point():
        raise InvalidArgument(f"chunk_weights has dtype {weights.dtype}; a float dtype is needed")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor, mask_last_token: bool) -> None:
    B, T, HQ, D = q.shape
    P, H, C, Dv = *k.shape[:3], v.shape[3]
    if T > MAX_DECODE_TOKENS:
        raise InvalidArgument(f"q has T = {T} tokens; at most {MAX_DECODE_TOKENS} are decoded, use hsa_attention")
    _check_shape("k_chunks", k, (P, H, C, D), "[P, H, C, D]")
    _check_shape("v_chunks", v, (P, H, C, Dv), "[P, H, C, Dv]")
    if H == 0 or HQ % H:
        raise InvalidArgument(f"q has {HQ} heads, which is no multiple of the {H} heads of k_chunks")
    least = 2 if mask_last_token else 1
    if not least <= C <= MAX_CHUNK_SIZE:
        raise InvalidArgument(f"k_chunks has C = {C} keys a chunk; {least} … {MAX_CHUNK_SIZE} are allowed")
    if not (1 <= D <= MAX_HEAD_DIM and 1 <= Dv <= MAX_HEAD_DIM):
        raise InvalidArgument(f"head dims D = {D} and Dv = {Dv} must be in 1 … {MAX_HEAD_DIM}")
    K = indices.shape[3]
    _check_shape("chunk_indices", indices, (B, T, H, K), "[B, T, H, K]")
    heads = HQ if weights.shape[2] == HQ else H
    _check_shape("chunk_weights", weights, (B, T, heads, K), "[B, T, H or HQ, K]")


def _check_shape(name: str, x: Tensor, expected: tuple[int, ...], letters: str) -> None:
    if tuple(x.shape) != expected:
        raise InvalidArgument(f"{name} has shape {list(x.shape)}; {letters} = {list(expected)} is needed")


def _check_page_table(page_table: Tensor, q: Tensor) -> None:
    if not isinstance(page_table, Tensor):
        raise InvalidArgument(f"page_table is a {type(page_table).__name__}, not a tensor")
    if page_table.dim() != 2 or page_table.shape[0] != q.shape[0]:
        raise InvalidArgument(f"page_table has shape {list(page_table.shape)}; [B, N] = [{q.shape[0]}, N] is needed")
    if page_table.dtype not in (torch.int32, torch.int64):
        raise InvalidArgument(f"page_table has dtype {page_table.dtype}; int32 or int64 is needed")
    if page_table.device != q.device:
        raise InvalidArgument(f"page_table is on {page_table.device}, q on {q.device}; both must be on one device")
