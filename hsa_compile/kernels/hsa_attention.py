"""The op as users call it: arguments checked, the tuned kernel looked up, gradients registered."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hsa_compile.errors import InvalidArgument
from hsa_compile.kernels.compile import Kernel
from hsa_compile.kernels.resolve import resolve
from hsa_compile.problem import DTYPES, MAX_CHUNK_SIZE, MAX_HEAD_DIM, Problem
from hsa_compile.schedules.cache import default_cache
from hsa_compile.target import Target

_DTYPE_NAMES = {getattr(torch, name): name for name in DTYPES}
_MAX_REMEMBERED = 4096
_kernels: dict[tuple[Any, ...], Kernel] = {}


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
    deterministic: bool = False,
) -> Tensor:
    """Hierarchical sparse attention over selected chunks, with the schedule that was tuned for this shape.

        o[t,h] = Σ_i  w[t,·,i] · softmax(scale · q[t,h] K_cᵀ) V_c        with c = chunk_indices[t, h // G, i]

    Each chunk is attended to on its own and the results are fused by weight. There is no causal mask inside:
    a token sees exactly the chunks in its slots. Differentiable in q, k, v and chunk_weights.

    Args:
        q: `[B, T, HQ, D]`, float32, bfloat16 or float16; float64 on a CPU.
        k: `[B, S, H, D]`, dtype and device of q; `HQ` is a multiple of `H`, `D` at most 256. Chunk `c` is the
            rows `c·C … (c+1)·C − 1`; rows past the last whole chunk belong to none.
        v: `[B, S, H, Dv]`, dtype and device of q; `Dv` at most 256.
        chunk_indices: `[B, T, H, K]` int32 or int64, in any order; −1 is an empty slot; a chunk named twice
            counts twice. On a GPU a value outside −1 … S // C − 1 is taken as empty, since to look would wait.
        chunk_weights: `[B, T, H, K]`, or `[B, T, HQ, K]` for a weight of its own for each query head; any
            float dtype, float32 by custom. Weights of empty slots are never read.
        chunk_size: `C`, keys in a chunk.
        scale: factor of the logits; `D ** -0.5` if None.
        softmax_off_by_one: an extra 1 in each chunk's normaliser, so that a chunk may be ignored.
        deterministic: only schedules that give the same bits in every run.

    Returns:
        o `[B, T, HQ, Dv]` in the dtype of q; zeros where all slots are empty.

    Raises:
        InvalidArgument: a shape, dtype, device or value is not allowed; the message shows it and what is.

    Source: arXiv 2504.16795, section 3; softmax-off-by-one from arXiv 2410.01651.
    """
    _check(q, k, v, chunk_indices, chunk_weights, chunk_size)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    elif not isinstance(scale, int | float) or not math.isfinite(scale):
        raise InvalidArgument(f"scale = {scale!r} must be a finite number, or None for D ** -0.5")
    if chunk_indices.numel() == 0 or q.numel() == 0 or k.shape[1] < chunk_size:
        return _nothing_to_attend_to(q, k, v, chunk_weights)
    o: Tensor = _HSAAttention.apply(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        chunk_indices.contiguous(),
        chunk_weights.contiguous(),
        chunk_size,
        scale,
        softmax_off_by_one,
        deterministic,
    )
    return o


class _HSAAttention(torch.autograd.Function):
    """Forward and backward kernels; q, k, v, indices and weights are all that is kept in between."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(q, k, v, indices, weights)
        ctx.options = options
        kernel = _kernel("hsa_forward", q, k, v, indices, weights, options)
        return kernel.entry(q, k, v, indices, weights, scale=options[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, indices, weights = ctx.saved_tensors
        kernel = _kernel("hsa_backward", q, k, v, indices, weights, ctx.options)
        dq, dk, dv, dw = kernel.entry(q, k, v, indices, weights, grad_o.contiguous(), scale=ctx.options[1])
        gradients = (dq, dk, dv, None, dw)
        needed = ctx.needs_input_grad
        return (*(g if needed[i] else None for i, g in enumerate(gradients)), None, None, None, None)


def _kernel(
    op: str, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor, options: tuple[Any, ...]
) -> Kernel:
    """The kernel for these tensors: a dictionary access, except the first time."""
    chunk_size, _, softmax_off_by_one, deterministic = options
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    target = Target.of(q.device)
    weight_heads, num_slots = weights.shape[2:]
    key = (
        op, q.shape, k.shape, v.shape[3], num_slots, weight_heads, q.dtype, chunk_size, softmax_off_by_one,
        deterministic, target, default_cache().generation,
    )  # fmt: skip
    kernel = _kernels.get(key)
    if kernel is None:
        problem = Problem(
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
            dtype=_DTYPE_NAMES[q.dtype],
            softmax_off_by_one=softmax_off_by_one,
            per_head_weights=weight_heads != k.shape[2],
            deterministic=deterministic,
        )
        if len(_kernels) >= _MAX_REMEMBERED:  # lengths that never repeat must not grow memory without bound
            _kernels.clear()
        kernel = _kernels[key] = resolve(problem, target)
    return kernel


def _nothing_to_attend_to(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    """Zeros that still belong to the graph, for no tokens, no slots or no whole chunk."""
    o = q.new_zeros(*q.shape[:3], v.shape[3])
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, weights)):
        for x in (q, k, v, weights):
            o = o + 0 * x[:0].sum().to(q.dtype)
    return o


def _check(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor, chunk_size: int) -> None:
    for name, x in (("q", q), ("k", k), ("v", v), ("chunk_indices", indices), ("chunk_weights", weights)):
        if not isinstance(x, Tensor):
            raise InvalidArgument(f"{name} is a {type(x).__name__}, not a tensor")
        if x.dim() != 4:
            raise InvalidArgument(f"{name} has shape {list(x.shape)}; four dimensions are needed")
        if x.device != q.device:
            raise InvalidArgument(f"{name} is on {x.device}, q on {q.device}; all must be on one device")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in _DTYPE_NAMES or x.dtype != q.dtype:
            raise InvalidArgument(f"{name} has dtype {x.dtype}; q, k and v must share one of {', '.join(DTYPES)}")
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or not 1 <= chunk_size <= MAX_CHUNK_SIZE:
        raise InvalidArgument(f"chunk_size = {chunk_size!r} must be an integer in 1 … {MAX_CHUNK_SIZE}")
    B, T, HQ, D = q.shape
    S, H, Dv = k.shape[1], k.shape[2], v.shape[3]
    _check_shape("k", k, (B, S, H, D), "[B, S, H, D]")
    _check_shape("v", v, (B, S, H, Dv), "[B, S, H, Dv]")
    if H == 0 or HQ % H:
        raise InvalidArgument(f"q has {HQ} heads, which is no multiple of the {H} heads of k")
    if not (1 <= D <= MAX_HEAD_DIM and 1 <= Dv <= MAX_HEAD_DIM):
        raise InvalidArgument(f"head dims D = {D} and Dv = {Dv} must be in 1 … {MAX_HEAD_DIM}")
    _check_shape("chunk_indices", indices, (B, T, H, indices.shape[3]), "[B, T, H, K]")
    if indices.dtype not in (torch.int32, torch.int64):
        raise InvalidArgument(f"chunk_indices has dtype {indices.dtype}; int32 or int64 is needed")
    heads = HQ if weights.shape[2] == HQ else H
    _check_shape("chunk_weights", weights, (B, T, heads, indices.shape[3]), "[B, T, H or HQ, K]")
    if not weights.is_floating_point():
        raise InvalidArgument(f"chunk_weights has dtype {weights.dtype}; a float dtype is needed")
    if indices.device.type == "cpu" and indices.numel():
        low, high = (int(x) for x in indices.aminmax())
        if low < -1 or high >= S // chunk_size:
            raise InvalidArgument(
                f"chunk_indices holds {low if low < -1 else high}; allowed are -1 (empty) and "
                f"0 … {S // chunk_size - 1}, the {S // chunk_size} whole chunks of {S} keys"
            )


def _check_shape(name: str, x: Tensor, expected: tuple[int, ...], letters: str) -> None:
    if tuple(x.shape) != expected:
        raise InvalidArgument(f"{name} has shape {list(x.shape)}; {letters} = {list(expected)} is needed")
