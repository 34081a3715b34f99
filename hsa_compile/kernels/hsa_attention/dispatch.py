"""The kernels of `hsa_attention` as operators of PyTorch: their schemas, shapes for tracing, and gradients.

Each call of an operator finds the tuned kernel of its problem.
"""

from typing import Any

import torch
from torch import Tensor

from hsa_compile.errors import InvalidArgument
from hsa_compile.kernels.compile import Kernel
from hsa_compile.kernels.gradient import register_gradient
from hsa_compile.kernels.resolve import remembered
from hsa_compile.problem import DTYPES, Problem
from hsa_compile.target import Target

DEVICE_TYPES = ("cpu", "cuda", "meta")  # those with a kernel, and `meta`, which has shapes alone
DTYPE_NAMES = {getattr(torch, name): name for name in DTYPES}


_OPTIONS = "int chunk_size, float scale, bool softmax_off_by_one, bool mask_last_token, bool deterministic"
_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor chunk_indices, Tensor chunk_weights, Tensor? chunk_starts"

_library = torch.library.Library("hsa_compile", "DEF")
_library.define(f"hsa_forward({_TENSORS}, {_OPTIONS}) -> Tensor")
_library.define(f"hsa_backward({_TENSORS}, Tensor grad_o, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)")

hsa_forward = torch.ops.hsa_compile.hsa_forward.default
hsa_backward = torch.ops.hsa_compile.hsa_backward.default


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor, chunk_starts: Tensor | None, *options: Any
) -> Tensor:
    return _run("hsa_forward", (q, k, v, indices, weights), chunk_starts, options)


def _run_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    weights: Tensor,
    chunk_starts: Tensor | None,
    grad_o: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _run("hsa_backward", (q, k, v, indices, weights, grad_o), chunk_starts, options)


def _run(op: str, tensors: tuple[Tensor, ...], chunk_starts: Tensor | None, options: tuple[Any, ...]) -> Any:
    tensors = tuple(x.contiguous() for x in tensors)
    kernel = _kernel(op, tensors, chunk_starts, options)
    if chunk_starts is None:
        return kernel.entry(*tensors, scale=options[1])
    return kernel.entry(*tensors, scale=options[1], chunk_starts=chunk_starts)


def _kernel(op: str, tensors: tuple[Tensor, ...], chunk_starts: Tensor | None, options: tuple[Any, ...]) -> Kernel:
    """Returns the kernel for these tensors: a dictionary access, except the first time."""
    q, k, v, indices, weights = tensors[:5]
    chunk_size, _, softmax_off_by_one, mask_last_token, deterministic = options
    num_chunks = k.shape[1] // chunk_size if chunk_starts is None else chunk_starts.numel()
    if op == "hsa_forward" and indices.device.type == "cpu":
        _check_values(indices, num_chunks, k.shape[1])
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    target = Target.of(q.device)
    weight_heads, num_slots = weights.shape[2:]
    key = (
        op, q.shape, k.shape, v.shape[3], num_slots, weight_heads, q.dtype, chunk_size, softmax_off_by_one,
        mask_last_token, chunk_starts is None, deterministic,
    )  # fmt: skip
    return remembered(
        key,
        target,
        lambda: Problem(
            op=op,
            batch=q.shape[0],
            seq_len=q.shape[1],
            kv_len=k.shape[1],
            num_heads=q.shape[2],
            num_kv_heads=k.shape[2],
            head_dim=q.shape[3],
            value_dim=v.shape[3],
            chunk_size=chunk_size,
            top_k=num_slots,
            dtype=DTYPE_NAMES[q.dtype],
            softmax_off_by_one=softmax_off_by_one,
            per_head_weights=weight_heads != k.shape[2],
            mask_last_token=mask_last_token,
            packed=chunk_starts is not None,
            deterministic=deterministic,
        ),
    )


def _check_values(indices: Tensor, num_chunks: int, kv_len: int) -> None:
    low, high = (int(x) for x in indices.aminmax())
    if low < -1 or high >= num_chunks:
        raise InvalidArgument(
            f"chunk_indices holds {low if low < -1 else high}; allowed are -1 (empty) and "
            f"0 … {num_chunks - 1}, the {num_chunks} whole chunks of {kv_len} keys"
        )


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


def _fake_backward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dw = (x.new_empty(x.shape) for x in (q, k, v, weights))
    return dq, dk, dv, dw


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, chunk_starts = inputs[:6]
    ctx.save_for_backward(*tensors, chunk_starts)
    ctx.options = inputs[6:]


def _gradient(ctx: Any, grad_o: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, chunk_starts = ctx.saved_tensors
    dq, dk, dv, dw = hsa_backward(*tensors, chunk_starts, grad_o, *ctx.options)
    return (dq, dk, dv, None, dw, *[None] * (1 + len(ctx.options)))


for _device in ("CPU", "CUDA"):
    _library.impl("hsa_forward", _run_forward, _device)
    _library.impl("hsa_backward", _run_backward, _device)
torch.library.register_fake("hsa_compile::hsa_forward", _fake_forward, lib=_library)
torch.library.register_fake("hsa_compile::hsa_backward", _fake_backward, lib=_library)
register_gradient(_library, "hsa_forward", _save, _gradient)
