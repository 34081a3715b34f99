"""The kernels of `hsa_attention` as operators of PyTorch: their schemas, shapes for tracing, and gradients.

Each call of an operator finds the tuned kernel of its problem. What does not fit is refused here, so on every path to a
kernel: eager, compiled, exported.
"""

import functools
import sys
from typing import Any

import torch
from torch import Tensor

from hsa_compile.checks import check_count, shown
from hsa_compile.errors import InvalidArgument
from hsa_compile.kernels.compile import Kernel
from hsa_compile.kernels.gradient import register_gradient, register_no_gradient
from hsa_compile.kernels.resolve import remembered
from hsa_compile.problem import DTYPES, MAX_CHUNK_SIZE, MAX_HEAD_DIM, Problem
from hsa_compile.target import Target

DEVICE_TYPES = ("cpu", "cuda", "meta")  # those with a kernel, and `meta`, which has shapes alone
_MAX_FLOAT = sys.float_info.max
_PLAIN = (Tensor, torch.nn.Parameter)
DTYPE_NAMES = {getattr(torch, name): name for name in DTYPES}


_OPTIONS = "int chunk_size, float scale, bool softmax_off_by_one, bool mask_last_token, bool deterministic"
_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor chunk_indices, Tensor chunk_weights, Tensor? chunk_starts"

_library = torch.library.Library("hsa_compile", "DEF")
_library.define(f"hsa_forward({_TENSORS}, {_OPTIONS}) -> Tensor")
_library.define(f"hsa_backward({_TENSORS}, Tensor grad_o, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)")

_library.define("sequence_bounds(Tensor cu_seqlens, SymInt seq_len) -> Tensor")

hsa_forward = torch.ops.hsa_compile.hsa_forward.default
hsa_backward = torch.ops.hsa_compile.hsa_backward.default
sequence_bounds = torch.ops.hsa_compile.sequence_bounds.default


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
    if options[1] < 0:  # the scale, which is never negative in a kernel
        results = _run(op, (-tensors[0], *tensors[1:]), chunk_starts, (options[0], -options[1], *options[2:]))
        return results if op == "hsa_forward" else (-results[0], *results[1:])
    tensors = tuple(x.contiguous() for x in tensors)
    kernel = _kernel(op, tensors, chunk_starts, options)
    kv_len, indices, chunk_size = tensors[1].shape[1], tensors[3], options[0]
    if indices.device.type == "cpu":
        check_values(indices, chunk_starts, kv_len, chunk_size)
    elif chunk_starts is not None:
        chunk_starts = chunk_starts.clamp(0, kv_len - chunk_size)  # a check would wait for the device
    if chunk_starts is None:
        return kernel.run(*tensors, scale=options[1])
    return kernel.run(*tensors, scale=options[1], chunk_starts=chunk_starts.contiguous())


def _kernel(op: str, tensors: tuple[Tensor, ...], chunk_starts: Tensor | None, options: tuple[Any, ...]) -> Kernel:
    """Returns the kernel for these tensors: a dictionary access, except the first time.

    The key is all that decides whether they fit, so what is remembered was checked.
    """
    chunk_size, _, softmax_off_by_one, mask_last_token, deterministic = options
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    given = tensors if chunk_starts is None else (*tensors, chunk_starts)
    key = (
        op, *[(x.shape, x.dtype, x.device) for x in given], chunk_size, softmax_off_by_one, mask_last_token,
        chunk_starts is None, deterministic,
    )  # fmt: skip
    problem = functools.partial(_problem, op, tensors, chunk_starts, options, deterministic)
    return remembered(key, Target.of(tensors[0].device), problem)


def _problem(
    op: str, tensors: tuple[Tensor, ...], chunk_starts: Tensor | None, options: tuple[Any, ...], deterministic: bool
) -> Problem:
    """Returns the problem that the tensors of a call stand for; raises InvalidArgument if they do not fit."""
    q, k, v, indices, weights = tensors[:5]
    chunk_size, _, softmax_off_by_one, mask_last_token, _ = options
    check_arguments(q, k, v, indices, weights, chunk_size, mask_last_token)
    if op == "hsa_backward":
        check_grad("grad_o", tensors[5], (*q.shape[:3], v.shape[3]), q.dtype, q.device)
    if chunk_starts is not None:
        check_chunk_starts(chunk_starts, k, chunk_size)
    if q.device.type == "cpu" and indices.numel():
        check_values(indices, chunk_starts, k.shape[1], chunk_size)  # before a kernel is built in vain
    return Problem(
        op=op,
        batch=q.shape[0],
        seq_len=q.shape[1],
        kv_len=k.shape[1],
        num_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        chunk_size=chunk_size,
        top_k=indices.shape[3],
        dtype=DTYPE_NAMES[q.dtype],
        softmax_off_by_one=softmax_off_by_one,
        per_head_weights=weights.shape[2] != k.shape[2],
        mask_last_token=mask_last_token,
        packed=chunk_starts is not None,
        deterministic=deterministic,
    )


def check_values(indices: Tensor, chunk_starts: Tensor | None, kv_len: int, chunk_size: int) -> None:
    """Raises InvalidArgument unless indices, which are on a CPU and not none, name chunks that there are."""
    num_chunks = kv_len // chunk_size if chunk_starts is None else chunk_starts.numel()
    low, high = (int(x) for x in indices.aminmax())
    if low < -1 or high >= num_chunks:
        chunks = f"and 0 … {num_chunks - 1}, the {num_chunks} whole chunks" if num_chunks else "alone, no whole chunk"
        raise InvalidArgument(
            f"chunk_indices holds {low if low < -1 else high}; allowed are -1 (empty) {chunks} of {kv_len} keys"
        )
    if chunk_starts is not None and num_chunks:
        low, high = (int(x) for x in chunk_starts.aminmax())
        if low < 0 or high > kv_len - chunk_size:
            raise InvalidArgument(
                f"chunk_starts holds {low if low < 0 else high}; allowed are rows 0 … {kv_len - chunk_size}"
            )


def check_arguments(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor, chunk_size: int, mask_last_token: bool
) -> None:
    """Raises InvalidArgument unless these are the tensors of a problem; the message names the first that is not.

    The values of indices are not looked at: that would wait for a GPU.
    """
    # Every call of the op pays for this: each attribute of a tensor is read once.
    if not isinstance(q, Tensor):
        raise InvalidArgument(f"q is a {type(q).__name__}, not a tensor")
    device, dtype = q.device, q.dtype
    for name, x in (("q", q), ("k", k), ("v", v), ("chunk_indices", indices), ("chunk_weights", weights)):
        if not isinstance(x, Tensor):
            raise InvalidArgument(f"{name} is a {type(x).__name__}, not a tensor")
        if x.dim() != 4:
            raise InvalidArgument(f"{name} has shape {list(x.shape)}; four dimensions are needed")
        if x.device != device:
            raise InvalidArgument(f"{name} is on {x.device}, q on {device}; all must be on one device")
    if device.type not in DEVICE_TYPES:
        raise InvalidArgument(f"device '{device}' is not supported; supported are cpu and cuda (NVIDIA or AMD)")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != dtype or dtype not in DTYPE_NAMES:
            raise InvalidArgument(f"{name} has dtype {x.dtype}; q, k and v must share one of {', '.join(DTYPES)}")
    least = 2 if mask_last_token else 1
    check_count("chunk_size", chunk_size, least, MAX_CHUNK_SIZE)
    k_shape, v_shape, indices_shape, weights_shape = k.shape, v.shape, indices.shape, weights.shape
    B, T, HQ, D = q.shape
    S, H, Dv, K = k_shape[1], k_shape[2], v_shape[3], indices_shape[3]
    check_shape("k", k_shape, (B, S, H, D), "[B, S, H, D]")
    check_shape("v", v_shape, (B, S, H, Dv), "[B, S, H, Dv]")
    if H == 0 or HQ % H:
        raise InvalidArgument(f"q has {HQ} heads, which is no multiple of the {H} heads of k")
    if not (1 <= D <= MAX_HEAD_DIM and 1 <= Dv <= MAX_HEAD_DIM):
        raise InvalidArgument(f"head dims D = {D} and Dv = {Dv} must be in 1 … {MAX_HEAD_DIM}")
    check_shape("chunk_indices", indices_shape, (B, T, H, K), "[B, T, H, K]")
    if indices.dtype not in (torch.int32, torch.int64):
        raise InvalidArgument(f"chunk_indices has dtype {indices.dtype}; int32 or int64 is needed")
    heads = HQ if weights_shape[2] == HQ else H
    check_shape("chunk_weights", weights_shape, (B, T, heads, K), "[B, T, H or HQ, K]")
    if not weights.is_floating_point():
        raise InvalidArgument(f"chunk_weights has dtype {weights.dtype}; a float dtype is needed")


def check_scale(scale: object) -> None:
    """Raises InvalidArgument unless this is a number that a float can hold, or None."""
    if scale is not None and not (isinstance(scale, int | float) and -_MAX_FLOAT <= scale <= _MAX_FLOAT):
        raise InvalidArgument(f"scale = {shown(scale)} must be a finite number, or None for D ** -0.5")


def are_checked_below(*tensors: Tensor) -> bool:
    """Returns whether an operator's own kernel will see these tensors, which checks each combination of shapes once.

    It will not where a call is traced, nor where it goes to what has no kernel of ours, such as another device or a
    subclass of tensors; there the public function has to check.
    """
    return not torch.compiler.is_compiling() and all(
        type(x) in _PLAIN and (x.is_cpu or x.is_cuda) and x.dim() >= 2 for x in tensors
    )


def check_shape(name: str, shape: torch.Size, expected: tuple[int, ...], letters: str) -> None:
    """Raises InvalidArgument unless a shape is the one that the letters stand for."""
    if shape != expected:
        raise InvalidArgument(f"{name} has shape {list(shape)}; {letters} = {list(expected)} is needed")


def check_grad(name: str, grad: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raises InvalidArgument unless a gradient has the shape, dtype and device of what it is the gradient of."""
    if tuple(grad.shape) != shape or grad.dtype != dtype or grad.device != device:
        raise InvalidArgument(
            f"{name} has shape {list(grad.shape)} and dtype {grad.dtype} on {grad.device}; {list(shape)} and {dtype} "
            f"on {device} are needed"
        )


def check_chunk_starts(chunk_starts: Tensor, k: Tensor, chunk_size: int) -> None:
    """Raises InvalidArgument unless these may be the first rows of the chunks of keys `[1, S, H, D]`."""
    if chunk_starts.dim() != 1 or chunk_starts.dtype != torch.int32 or chunk_starts.device != k.device:
        raise InvalidArgument(
            f"chunk_starts has shape {list(chunk_starts.shape)} and dtype {chunk_starts.dtype} on "
            f"{chunk_starts.device}; [num_chunks] of int32 on {k.device} is needed"
        )
    if k.shape[0] != 1 or k.shape[1] < chunk_size:
        raise InvalidArgument(
            f"chunk_starts needs a batch of 1 and a whole chunk of {chunk_size} keys; k has shape {list(k.shape)}"
        )


def check_cu_seqlens(cu_seqlens: Tensor) -> None:
    """Raises InvalidArgument unless these may be the bounds of sequences; their values are not looked at."""
    if not isinstance(cu_seqlens, Tensor):
        raise InvalidArgument(f"cu_seqlens is a {type(cu_seqlens).__name__}, not a tensor")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise InvalidArgument(
            f"cu_seqlens has shape {list(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; "
            "[num_sequences + 1] of int32 or int64 is needed"
        )


def _bounds_on_cpu(cu_seqlens: Tensor, seq_len: int) -> Tensor:
    """Returns a copy in int64 of bounds that rise from 0 to the end; raises InvalidArgument if they do not."""
    check_cu_seqlens(cu_seqlens)
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != seq_len or bounds != sorted(bounds):
        raise InvalidArgument(f"cu_seqlens = {bounds} must rise from 0 to T = {seq_len}")
    return cu_seqlens.to(torch.int64, copy=True)


def _bounds_on_gpu(cu_seqlens: Tensor, seq_len: int) -> Tensor:
    """Returns bounds that rise and lie within the sequence, whatever is given: a check would wait for the device."""
    check_cu_seqlens(cu_seqlens)
    return cu_seqlens.to(torch.int64).clamp(0, seq_len).cummax(0).values


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


def _fake_backward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dw = (x.new_empty(x.shape) for x in (q, k, v, weights))
    return dq, dk, dv, dw


def _fake_bounds(cu_seqlens: Tensor, seq_len: int) -> Tensor:
    del seq_len
    return cu_seqlens.new_empty(cu_seqlens.shape, dtype=torch.int64)


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
_library.impl("sequence_bounds", _bounds_on_cpu, "CPU")
_library.impl("sequence_bounds", _bounds_on_gpu, "CUDA")
torch.library.register_fake("hsa_compile::sequence_bounds", _fake_bounds, lib=_library)
torch.library.register_fake("hsa_compile::hsa_forward", _fake_forward, lib=_library)
torch.library.register_fake("hsa_compile::hsa_backward", _fake_backward, lib=_library)
register_gradient(_library, "hsa_forward", _save, _gradient)
register_no_gradient(
    _library, "hsa_backward", "hsa_attention has no second derivative; its gradient cannot be differentiated"
)
