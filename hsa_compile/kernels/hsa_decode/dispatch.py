"""`hsa_decode` as an operator of PyTorch: its schema and its shape for tracing; each call finds its tuned kernel."""

from typing import Any

import torch
from torch import Tensor

from hsa_compile.errors import InvalidArgument
from hsa_compile.kernels.compile import Kernel
from hsa_compile.kernels.hsa_attention.dispatch import DTYPE_NAMES
from hsa_compile.kernels.resolve import remembered
from hsa_compile.problem import Problem
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
    for name, x in (("k_chunks", k_chunks), ("v_chunks", v_chunks)):
        _check_memory(name, x, q.device)
    kernel = _kernel(q, k_chunks, v_chunks, weights, page_table, softmax_off_by_one, mask_last_token)
    tensors = (q.contiguous(), k_chunks, v_chunks, indices.contiguous(), weights.contiguous())
    if page_table is None:
        return kernel.entry(*tensors, scale=scale)
    return kernel.entry(*tensors, page_table=page_table.contiguous(), scale=scale)


def _check_memory(name: str, x: Tensor, device: torch.device) -> None:
    """Raises InvalidArgument unless kernels can read the pages where they lie: a copy costs more than the attention."""
    if x.device != device and not x.is_pinned():
        raise InvalidArgument(
            f"{name} is in pageable memory of the CPU, q on {device}; pin it (`Tensor.pin_memory`) or move it"
        )
    _, num_heads, chunk_size, width = x.shape
    inner = (chunk_size * width, width, 1)
    dims = zip(x.shape[1:], x.stride()[1:], inner, strict=True)
    if x.stride(0) % width or any(size != 1 and stride != needed for size, stride, needed in dims):
        raise InvalidArgument(
            f"{name} has strides {list(x.stride())}; a page [H, C, D] = {[num_heads, chunk_size, width]} must be "
            f"contiguous, strides [n · {width}, {', '.join(map(str, inner))}]"
        )


def _kernel(
    q: Tensor,
    k_chunks: Tensor,
    v_chunks: Tensor,
    weights: Tensor,
    page_table: Tensor | None,
    softmax_off_by_one: bool,
    mask_last_token: bool,
) -> Kernel:
    """Returns the kernel for these tensors: a dictionary access, except the first time."""
    target = Target.of(q.device)
    num_pages, num_kv_heads, chunk_size, _ = k_chunks.shape
    num_chunks = num_pages if page_table is None else page_table.shape[1]
    weight_heads, num_slots = weights.shape[2:]
    key = (
        "hsa_decode", q.shape, num_chunks, num_kv_heads, chunk_size, v_chunks.shape[3], num_slots, weight_heads,
        q.dtype, page_table is None, softmax_off_by_one, mask_last_token,
    )  # fmt: skip
    return remembered(
        key,
        target,
        lambda: Problem(
            op="hsa_decode",
            batch=q.shape[0],
            seq_len=q.shape[1],
            kv_len=num_chunks * chunk_size,
            num_heads=q.shape[2],
            num_kv_heads=num_kv_heads,
            head_dim=q.shape[3],
            value_dim=v_chunks.shape[3],
            chunk_size=chunk_size,
            top_k=num_slots,
            dtype=DTYPE_NAMES[q.dtype],
            softmax_off_by_one=softmax_off_by_one,
            per_head_weights=weight_heads != num_kv_heads,
            mask_last_token=mask_last_token,
            paged=page_table is not None,
        ),
    )


def _fake(q: Tensor, k_chunks: Tensor, v_chunks: Tensor, *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], v_chunks.shape[3])


for _device in ("CPU", "CUDA"):
    _library.impl("hsa_decode", _run, _device)
torch.library.register_fake("hsa_compile::hsa_decode", _fake, lib=_library)
