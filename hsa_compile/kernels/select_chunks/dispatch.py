"""`select_chunks` and its backward as operators of PyTorch: their schemas, shapes for tracing, and gradients."""

from typing import Any

import torch
from torch import Tensor

from hsa_compile.checks import check_choice, check_count
from hsa_compile.errors import InvalidArgument
from hsa_compile.kernels.compile import Kernel
from hsa_compile.kernels.gradient import register_gradient, register_no_gradient
from hsa_compile.kernels.gumbel import noise_keys
from hsa_compile.kernels.hsa_attention.dispatch import DEVICE_TYPES, DTYPE_NAMES, check_grad
from hsa_compile.kernels.resolve import remembered
from hsa_compile.problem import DTYPES, LANDMARKS_PER_CHUNK, MAX_RETRIEVAL_DIM, Problem
from hsa_compile.target import Target

MAX_OFFSET = 2**40

_library = torch.library.Library("hsa_compile", "FRAGMENT")
_library.define(
    "select_chunks(Tensor query, Tensor landmarks, int landmarks_per_chunk, int chunk_size, int top_k, SymInt offset, "
    "str fusion, SymInt? noise_seed, bool deterministic) -> (Tensor, Tensor)"
)
_library.define(
    "select_chunks_backward(Tensor query, Tensor landmarks, Tensor landmark_indices, Tensor grad_weights, "
    "int landmarks_per_chunk, int chunk_size, str fusion, bool deterministic) -> (Tensor, Tensor)"
)

select_chunks = torch.ops.hsa_compile.select_chunks.default
select_chunks_backward = torch.ops.hsa_compile.select_chunks_backward.default


def _run_forward(
    query: Tensor,
    landmarks: Tensor,
    landmarks_per_chunk: int,
    chunk_size: int,
    top_k: int,
    offset: int,
    fusion: str,
    noise_seed: int | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Returns (chunk_weights, landmark_indices), where there is something to select; the differentiable one is first.

    Of each chunk that is picked it names the landmark that scored highest; `backward` needs no more than that.
    """
    query, landmarks = query.contiguous(), landmarks.contiguous()
    check_count("offset", offset, 0, MAX_OFFSET)
    noise = noise_seed is not None
    options = (landmarks_per_chunk, chunk_size, top_k, fusion, noise, deterministic)
    kernel = _kernel("select_chunks", (query, landmarks), *options)
    keys = None
    if noise_seed is not None:
        batch, seq_len, num_heads, _ = query.shape
        positions = torch.arange(offset, offset + seq_len, device=query.device)
        keys = noise_keys(noise_seed % 2**64, batch, num_heads, positions)
    landmark_indices, chunk_weights = kernel.run(query, landmarks, keys, top_k=top_k, offset=offset)
    return chunk_weights, landmark_indices


def _run_backward(
    query: Tensor,
    landmarks: Tensor,
    landmark_indices: Tensor,
    grad_weights: Tensor,
    landmarks_per_chunk: int,
    chunk_size: int,
    fusion: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of query and landmarks, from those of the weights `[B, T, H, K]`."""
    tensors = tuple(x.contiguous() for x in (query, landmarks, landmark_indices, grad_weights))
    top_k = landmark_indices.shape[3] if landmark_indices.dim() == 4 else 1  # what has other dimensions does not fit
    options = (landmarks_per_chunk, chunk_size, top_k, fusion, False, deterministic)
    kernel = _kernel("select_chunks_backward", tensors, *options)
    if landmark_indices.device.type == "cpu":
        _check_values(landmark_indices, landmarks.shape[1])
    dquery, dlandmarks = kernel.run(*tensors)
    return dquery, dlandmarks


def _kernel(op: str, tensors: tuple[Tensor, ...], *options: Any) -> Kernel:
    """Returns the kernel for these tensors: a dictionary access, except the first time.

    The options are the last arguments of `_problem`. The key is all that decides whether tensors fit, so what is
    remembered was checked.
    """
    options = (*options[:-1], options[-1] or torch.are_deterministic_algorithms_enabled())
    key = (op, *[(x.shape, x.dtype, x.device) for x in tensors], *options)
    return remembered(key, Target.of(tensors[0].device), lambda: _problem(op, tensors, *options))


def _problem(
    op: str,
    tensors: tuple[Tensor, ...],
    landmarks_per_chunk: int,
    chunk_size: int,
    top_k: int,
    fusion: str,
    noise: bool,
    deterministic: bool,
) -> Problem:
    """Returns the problem that the tensors of a call stand for; raises InvalidArgument if they do not fit."""
    query, landmarks = tensors[:2]
    check_arguments(query, landmarks)
    check_choice("landmarks_per_chunk", landmarks_per_chunk, LANDMARKS_PER_CHUNK)
    if landmarks.shape[1] % landmarks_per_chunk:
        raise InvalidArgument(f"{landmarks.shape[1]} landmarks; a multiple of {landmarks_per_chunk} is needed")
    if op == "select_chunks_backward":
        slots = (*query.shape[:3], top_k)
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        check_grad("landmark_indices", tensors[2], slots, torch.int32, query.device)
        check_grad("grad_weights", tensors[3], slots, dtype, query.device)
        if query.device.type == "cpu" and tensors[2].numel():
            _check_values(tensors[2], landmarks.shape[1])  # before a kernel is built in vain
    return Problem(
        op=op,
        batch=query.shape[0],
        seq_len=query.shape[1],
        kv_len=landmarks.shape[1] // landmarks_per_chunk * chunk_size,
        num_heads=query.shape[2],
        num_kv_heads=query.shape[2],
        head_dim=query.shape[3],
        chunk_size=chunk_size,
        landmarks_per_chunk=landmarks_per_chunk,
        top_k=top_k,
        dtype=DTYPE_NAMES[query.dtype],
        fusion=fusion,
        noise=noise,
        deterministic=deterministic,
    )


def _check_values(landmark_indices: Tensor, num_landmarks: int) -> None:
    most = int(landmark_indices.max())
    if most >= num_landmarks:
        raise InvalidArgument(f"landmark_indices holds {most}; allowed are 0 … {num_landmarks - 1}, and -1 (empty)")


def check_arguments(query: Tensor, landmarks: Tensor) -> None:
    """Raises InvalidArgument unless these are the tensors of a problem; the message names the first that is not."""
    for name, x in (("query", query), ("landmarks", landmarks)):
        if not isinstance(x, Tensor):
            raise InvalidArgument(f"{name} is a {type(x).__name__}, not a tensor")
        if x.dim() != 4:
            raise InvalidArgument(f"{name} has shape {list(x.shape)}; four dimensions are needed")
        if x.device != query.device:
            raise InvalidArgument(f"{name} is on {x.device}, query on {query.device}; both must be on one device")
        if x.dtype not in DTYPE_NAMES or x.dtype != query.dtype:
            raise InvalidArgument(f"{name} has dtype {x.dtype}; both tensors must share one of {', '.join(DTYPES)}")
    if query.device.type not in DEVICE_TYPES:
        raise InvalidArgument(f"device '{query.device}' is not supported; supported are cpu and cuda (NVIDIA or AMD)")
    batch, _, num_heads, dim = query.shape
    expected = [batch, landmarks.shape[1], num_heads, dim]
    if list(landmarks.shape) != expected:
        raise InvalidArgument(f"landmarks has shape {list(landmarks.shape)}; [B, N, H, Dr] = {expected} is needed")
    if not 1 <= dim <= MAX_RETRIEVAL_DIM:
        raise InvalidArgument(f"retrieval dim Dr = {dim} must be in 1 … {MAX_RETRIEVAL_DIM}")


def _fake_forward(query: Tensor, landmarks: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    _, _, top_k, *_ = options
    shape = (*query.shape[:3], top_k)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(shape, dtype=dtype), query.new_empty(shape, dtype=torch.int32)


def _fake_backward(query: Tensor, landmarks: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), landmarks.new_empty(landmarks.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, landmarks, landmarks_per_chunk, chunk_size, _, _, fusion, _, deterministic = inputs
    ctx.save_for_backward(query, landmarks, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.options = (landmarks_per_chunk, chunk_size, fusion, deterministic)


def _gradient(ctx: Any, grad_weights: Tensor, grad_indices: Tensor | None) -> tuple[Tensor | None, ...]:
    del grad_indices  # picks are integers
    dquery, dlandmarks = select_chunks_backward(*ctx.saved_tensors, grad_weights, *ctx.options)
    return (dquery, dlandmarks, *(None,) * 7)


for _device in ("CPU", "CUDA"):
    _library.impl("select_chunks", _run_forward, _device)
    _library.impl("select_chunks_backward", _run_backward, _device)
torch.library.register_fake("hsa_compile::select_chunks", _fake_forward, lib=_library)
torch.library.register_fake("hsa_compile::select_chunks_backward", _fake_backward, lib=_library)
register_gradient(_library, "select_chunks", _save, _gradient)
register_no_gradient(
    _library, "select_chunks_backward", "select_chunks has no second derivative; its gradient cannot be differentiated"
)
