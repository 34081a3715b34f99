"""Calls the emitted C++ of `hsa_attention` and its backward on tensors, from all threads."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hsa_compile.kernels.native import pointer, sizes
from hsa_compile.kernels.worker_pool import add_chunk_gradients, run_on_workers
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Schedule


def attention_entry(library: ctypes.CDLL, problem: Problem, schedule: Schedule) -> Callable[..., Any]:
    """Returns the library's function as a callable on tensors, with the signature of any other emitted entry."""
    super_tile = schedule.number("super_tile")
    run = _forward if problem.op == "hsa_forward" else _backward

    def entry(*tensors: Tensor, scale: float, chunk_starts: Tensor | None = None) -> Any:
        return run(library, problem, super_tile, tensors, chunk_starts, scale)

    return entry


def _forward(
    library: ctypes.CDLL,
    problem: Problem,
    super_tile: int,
    tensors: tuple[Tensor, ...],
    chunk_starts: Tensor | None,
    scale: float,
) -> Tensor:
    q, k, v, indices, weights = tensors
    batch, seq_len, num_heads, _ = q.shape
    kv_len, num_kv_heads, num_slots = k.shape[1], k.shape[2], indices.shape[3]
    num_chunks = kv_len // problem.chunk_size if chunk_starts is None else chunk_starts.numel()
    indices, float_weights = indices.to(torch.int32), weights.to(torch.float32)
    o = torch.zeros(batch, seq_len, num_heads, problem.value_dim, dtype=torch.float32)
    pointers = [pointer(x) for x in (q, k, v, indices, float_weights, chunk_starts, o)]
    lengths = sizes(num_chunks, seq_len, kv_len, num_kv_heads, num_slots)

    def attend(first: int, last: int) -> None:
        library.hsa_forward(*pointers, *lengths, ctypes.c_double(scale), *sizes(first, last))

    run_on_workers(attend, batch * num_kv_heads * -(-seq_len // super_tile))
    return o.to(q.dtype)


def _backward(
    library: ctypes.CDLL,
    problem: Problem,
    super_tile: int,
    tensors: tuple[Tensor, ...],
    chunk_starts: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, indices, weights, grad_o = tensors
    batch, seq_len = q.shape[:2]
    kv_len, num_kv_heads, num_slots = k.shape[1], k.shape[2], indices.shape[3]
    num_chunks = kv_len // problem.chunk_size if chunk_starts is None else chunk_starts.numel()
    num_super_tiles = -(-seq_len // super_tile)
    indices, float_weights = indices.to(torch.int32), weights.to(torch.float32)
    dq = torch.zeros(q.shape, dtype=torch.float32)
    dw = torch.zeros(weights.shape, dtype=torch.float32)
    before = [pointer(x) for x in (q, k, v, indices, float_weights, grad_o, chunk_starts, dq)]
    lengths = sizes(num_chunks, seq_len, kv_len, num_kv_heads, num_slots)

    def differentiate(first: int, last: int) -> tuple[int, Tensor, Tensor]:
        first_pair, last_pair = first // num_super_tiles, (last - 1) // num_super_tiles
        rows = (last_pair - first_pair + 1, num_chunks * problem.chunk_size)
        dk = torch.zeros(*rows, problem.head_dim, dtype=torch.float32)
        dv = torch.zeros(*rows, problem.value_dim, dtype=torch.float32)
        own = [pointer(x) for x in (dk, dv, dw)]
        library.hsa_backward(*before, *own, *lengths, ctypes.c_double(scale), *sizes(first, last))
        return first_pair, dk, dv

    parts = [part for _, _, part in run_on_workers(differentiate, batch * num_kv_heads * num_super_tiles)]
    dk = add_chunk_gradients(k, [(pair, dk) for pair, dk, _ in parts], problem.chunk_size, chunk_starts)
    dv = add_chunk_gradients(v, [(pair, dv) for pair, _, dv in parts], problem.chunk_size, chunk_starts)
    return dq.to(q.dtype), dk, dv, dw.to(weights.dtype)
