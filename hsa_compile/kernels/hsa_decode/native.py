"""Calls the emitted C++ of `hsa_decode` on tensors, from as many threads as its schedule has work for."""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from hsa_compile.kernels.native import pointer, sizes
from hsa_compile.kernels.worker_pool import run_on_workers
from hsa_compile.problem import Problem
from hsa_compile.schedules.ops.hsa_decode import SHARED_BYTES
from hsa_compile.schedules.schedule import Schedule


def decode_entry(library: ctypes.CDLL, problem: Problem, schedule: Schedule) -> Callable[..., Tensor]:
    """Returns the library's function as a callable on tensors, with the signature of any other emitted entry."""
    split = schedule.number("num_splits")
    decode, value_dim = library.hsa_decode, problem.value_dim
    pick_bytes = problem.chunk_size * (problem.head_dim + value_dim) * problem.itemsize

    def entry(
        q: Tensor,
        k_chunks: Tensor,
        v_chunks: Tensor,
        chunk_indices: Tensor,
        chunk_weights: Tensor,
        *,
        page_table: Tensor | None = None,
        scale: float,
    ) -> Tensor:
        batch, seq_len, num_heads, _ = q.shape
        num_pages, num_kv_heads = k_chunks.shape[:2]
        weights = chunk_weights.to(torch.float32)
        parts = torch.zeros(split, batch, seq_len, num_heads, value_dim, dtype=torch.float32)
        tensors = (q, k_chunks, v_chunks, chunk_indices, weights, page_table, parts)
        lengths = sizes(
            num_pages,
            k_chunks.stride(0),
            v_chunks.stride(0),
            0 if page_table is None else page_table.shape[1],
            batch,
            seq_len,
            num_kv_heads,
            chunk_indices.shape[3],
            chunk_indices.dtype == torch.int64,
            page_table is not None and page_table.dtype == torch.int64,
        )
        arguments = (*map(pointer, tensors), *lengths, ctypes.c_double(scale))

        def attend(first: int, last: int) -> None:
            decode(*arguments, *sizes(first, last))

        items = batch * seq_len * num_kv_heads * split
        if split == 1 and chunk_indices.numel() * pick_bytes < SHARED_BYTES:
            attend(0, items)
        else:
            run_on_workers(attend, items)
        return (parts[0] if split == 1 else parts.sum(dim=0)).to(q.dtype)

    return entry
