"""`hsa_decode` as an operator of PyTorch: its schema and its shape for tracing; each call finds its tuned kernel."""

import functools
from typing import Any

import torch
from torch import Tensor

from hsa_compile.errors import InvalidArgument
from hsa_compile.kernels.compile import Kernel
from hsa_compile.kernels.gradient import register_no_gradient
from hsa_compile.kernels.hsa_attention.dispatch import DEVICE_TYPES, DTYPE_NAMES, check_shape
from hsa_compile.kernels.resolve import remembered
from hsa_compile.problem import DTYPES, MAX_CHUNK_SIZE, MAX_DECODE_TOKENS, MAX_HEAD_DIM, Problem
from hsa_compile.target import Target

_library = torch.library.Library("hsa_compile", "FRAGMENT")
_library.define(
    "hsa_decode(Tensor q, Tensor k_chunks, Tensor v_chunks, Tensor chunk_indices, Tensor chunk_weights, "
    "Tensor? page_table, float scale, bool softmax_off_by_one, bool mask_last_token) -> Tensor"
)

hsa_decode = torch.ops.hsa_compile.hsa_decode.default


def _run(
    q: Tensor,
    k_chunks: Tensor,
    v_chunks: Tensor,
    indices: Tensor,
    weights: Tensor,
    page_table: Tensor | None,
    scale: float,
    softmax_off_by_one: bool,
    mask_last_token: bool,
) -> Tensor:
    if scale < 0:  # it is never negative in a kernel
        q, scale = -q, -scale
    kernel = _kernel((q, k_chunks, v_chunks, indices, weights), page_table, softmax_off_by_one, mask_last_token)
    for name, x in (("k_chunks", k_chunks), ("v_chunks", v_chunks)):
        if x.device != q.device:
            _check_pinned(name, x, q.device)
    tensors = (q.contiguous(), k_chunks, v_chunks, indices.contiguous(), weights.contiguous())
    if page_table is None:
        return kernel.run(*tensors, scale=scale)
    return kernel.run(*tensors, page_table=page_table.contiguous(), scale=scale)


def _check_pinned(name: str, x: Tensor, device: torch.device) -> None:
    """Raises InvalidArgument unless pages on the CPU can be read from a GPU where they lie."""
    if not x.is_pinned():
        raise InvalidArgument(
            f"{name} is in pageable memory of the CPU, q on {device}; pin it (`Tensor.pin_memory`) or move it"
        )


def _check_strides(name: str, x: Tensor) -> None:
    """Raises InvalidArgument unless kernels can read the pages as they lie: a copy costs more than the attention."""
    _, num_heads, chunk_size, width = x.shape
    inner = (chunk_size * width, width, 1)
    dims = zip(x.shape[1:], x.stride()[1:], inner, strict=True)
    if x.stride(0) % width or any(size != 1 and stride != needed for size, stride, needed in dims):
        raise InvalidArgument(
            f"{name} has strides {list(x.stride())}; a page [H, C, D] = {[num_heads, chunk_size, width]} must be "
            f"contiguous, strides [n · {width}, {', '.join(map(str, inner))}]"
        )


def _kernel(
    tensors: tuple[Tensor, ...], page_table: Tensor | None, softmax_off_by_one: bool, mask_last_token: bool
) -> Kernel:
    """Returns the kernel for these tensors: a dictionary access, except the first time.

    The key is all that decides whether they fit, so what is remembered was checked.
    """
    given = tensors if page_table is None else (*tensors, page_table)
    strides = (tensors[1].stride(), tensors[2].stride())
    options = (page_table is None, softmax_off_by_one, mask_last_token)
    key = ("hsa_decode", *[(x.shape, x.dtype, x.device) for x in given], *strides, *options)
    problem = functools.partial(_problem, tensors, page_table, softmax_off_by_one, mask_last_token)
    return remembered(key, Target.of(tensors[0].device), problem)


def _problem(
    tensors: tuple[Tensor, ...], page_table: Tensor | None, softmax_off_by_one: bool, mask_last_token: bool
) -> Problem:
    """Returns the problem that the tensors of a call stand for; raises InvalidArgument if they do not fit."""
    q, k_chunks, v_chunks, indices, weights = tensors
    check_arguments(q, k_chunks, v_chunks, indices, weights, page_table, mask_last_token)
    _check_strides("k_chunks", k_chunks)
    _check_strides("v_chunks", v_chunks)
    num_pages, num_kv_heads, chunk_size, _ = k_chunks.shape
    num_chunks = num_pages if page_table is None else page_table.shape[1]
    return Problem(
        op="hsa_decode",
        batch=q.shape[0],
        seq_len=q.shape[1],
        kv_len=num_chunks * chunk_size,
        num_heads=q.shape[2],
        num_kv_heads=num_kv_heads,
        head_dim=q.shape[3],
        value_dim=v_chunks.shape[3],
        chunk_size=chunk_size,
        top_k=indices.shape[3],
        dtype=DTYPE_NAMES[q.dtype],
        softmax_off_by_one=softmax_off_by_one,
        per_head_weights=weights.shape[2] != num_kv_heads,
        mask_last_token=mask_last_token,
        paged=page_table is not None,
    )


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    weights: Tensor,
    page_table: Tensor | None,
    mask_last_token: bool,
) -> None:
    """Raises InvalidArgument unless these are the tensors of a problem; the message names the first that is not."""
    tensors = (("q", q), ("k_chunks", k), ("v_chunks", v), ("chunk_indices", indices), ("chunk_weights", weights))
    for name, x in tensors:
        if not isinstance(x, Tensor):
            raise InvalidArgument(f"{name} is a {type(x).__name__}, not a tensor")
        if x.dim() != 4:
            raise InvalidArgument(f"{name} has shape {list(x.shape)}; four dimensions are needed")
        in_host_memory = name in ("k_chunks", "v_chunks") and q.device.type == "cuda" and x.device.type == "cpu"
        if x.device != q.device and not in_host_memory:
            raise InvalidArgument(f"{name} is on {x.device}, q on {q.device}; all must be on one device")
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
    if page_table is not None:
        _check_page_table(page_table, q)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor, mask_last_token: bool) -> None:
    B, T, HQ, D = q.shape
    P, H, C, Dv = *k.shape[:3], v.shape[3]
    if T > MAX_DECODE_TOKENS:
        raise InvalidArgument(f"q has T = {T} tokens; at most {MAX_DECODE_TOKENS} are decoded, use hsa_attention")
    check_shape("k_chunks", k.shape, (P, H, C, D), "[P, H, C, D]")
    check_shape("v_chunks", v.shape, (P, H, C, Dv), "[P, H, C, Dv]")
    if H == 0 or HQ % H:
        raise InvalidArgument(f"q has {HQ} heads, which is no multiple of the {H} heads of k_chunks")
    least = 2 if mask_last_token else 1
    if not least <= C <= MAX_CHUNK_SIZE:
        raise InvalidArgument(f"k_chunks has C = {C} keys a chunk; {least} … {MAX_CHUNK_SIZE} are allowed")
    if not (1 <= D <= MAX_HEAD_DIM and 1 <= Dv <= MAX_HEAD_DIM):
        raise InvalidArgument(f"head dims D = {D} and Dv = {Dv} must be in 1 … {MAX_HEAD_DIM}")
    K = indices.shape[3]
    check_shape("chunk_indices", indices.shape, (B, T, H, K), "[B, T, H, K]")
    heads = HQ if weights.shape[2] == HQ else H
    check_shape("chunk_weights", weights.shape, (B, T, heads, K), "[B, T, H or HQ, K]")


def _check_page_table(page_table: Tensor, q: Tensor) -> None:
    if not isinstance(page_table, Tensor):
        raise InvalidArgument(f"page_table is a {type(page_table).__name__}, not a tensor")
    if page_table.dim() != 2 or page_table.shape[0] != q.shape[0]:
        raise InvalidArgument(f"page_table has shape {list(page_table.shape)}; [B, N] = [{q.shape[0]}, N] is needed")
    if page_table.dtype not in (torch.int32, torch.int64):
        raise InvalidArgument(f"page_table has dtype {page_table.dtype}; int32 or int64 is needed")
    if page_table.device != q.device:
        raise InvalidArgument(f"page_table is on {page_table.device}, q on {q.device}; both must be on one device")


def _fake(q: Tensor, k_chunks: Tensor, v_chunks: Tensor, *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], v_chunks.shape[3])


for _device in ("CPU", "CUDA"):
    _library.impl("hsa_decode", _run, _device)
torch.library.register_fake("hsa_compile::hsa_decode", _fake, lib=_library)
register_no_gradient(_library, "hsa_decode", "hsa_decode has no gradient; use hsa_attention")
