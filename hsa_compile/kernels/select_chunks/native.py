"""Calls the emitted C++ of `select_chunks` and its backward on tensors, from all threads."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hsa_compile.kernels.native import pointer, sizes
from hsa_compile.kernels.worker_pool import run_on_workers
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Schedule


def select_entry(library: ctypes.CDLL, problem: Problem, schedule: Schedule) -> Callable[..., Any]:
    """Returns the library's function as a callable on tensors, with the signature of any other emitted entry."""
    super_tile = schedule.number("super_tile")

    def forward(
        query: Tensor, landmarks: Tensor, noise_keys: Tensor | None, *, top_k: int, offset: int
    ) -> tuple[Tensor, Tensor]:
        return _forward(library, query, landmarks, noise_keys, top_k, offset)

    def backward(
        query: Tensor, landmarks: Tensor, chunk_indices: Tensor, grad_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        return _backward(library, super_tile, query, landmarks, chunk_indices, grad_weights)

    return forward if problem.op == "select_chunks" else backward


def _forward(
    library: ctypes.CDLL, query: Tensor, landmarks: Tensor, noise_keys: Tensor | None, top_k: int, offset: int
) -> tuple[Tensor, Tensor]:
    batch, seq_len, num_heads, _ = query.shape
    indices = torch.empty(batch, seq_len, num_heads, top_k, dtype=torch.int32)
    weights = torch.empty(batch, seq_len, num_heads, top_k, dtype=torch.float32)
    pointers = [pointer(x) for x in (query, landmarks, noise_keys, indices, weights)]
    lengths = sizes(batch, seq_len, landmarks.shape[1], num_heads, top_k, offset)
    num_workers = torch.get_num_threads()

    def select(first: int, last: int) -> None:
        for worker in range(first, last):
            library.select_chunks(*pointers, *lengths, *sizes(worker, num_workers))

    run_on_workers(select, num_workers)
    return indices, weights


def _backward(
    library: ctypes.CDLL, super_tile: int, query: Tensor, landmarks: Tensor, chunk_indices: Tensor, grad_weights: Tensor
) -> tuple[Tensor, Tensor]:
    batch, seq_len, num_heads, dim = query.shape
    num_chunks, num_super_tiles = landmarks.shape[1], -(-seq_len // super_tile)
    dquery = torch.zeros(query.shape, dtype=torch.float32)
    chunk_indices, grad_weights = chunk_indices.to(torch.int32), grad_weights.to(torch.float32)
    before = [pointer(x) for x in (query, landmarks, chunk_indices, grad_weights, dquery)]
    lengths = sizes(seq_len, num_chunks, num_heads, chunk_indices.shape[3])

    def differentiate(first: int, last: int) -> tuple[int, Tensor]:
        first_pair, last_pair = first // num_super_tiles, (last - 1) // num_super_tiles
        own = torch.zeros(last_pair - first_pair + 1, num_chunks, dim, dtype=torch.float32)
        library.select_chunks_backward(*before, pointer(own), *lengths, *sizes(first, last))
        return first_pair, own

    # Each worker has landmark gradients of its own; they are summed in order, so that every run gives the same bits.
    dlandmarks = torch.zeros(landmarks.shape, dtype=torch.float32)
    for _, _, (first_pair, own) in run_on_workers(differentiate, batch * num_heads * num_super_tiles):
        for pair, part in enumerate(own, start=first_pair):
            b, h = divmod(pair, num_heads)
            dlandmarks[b, :, h] += part
    return dquery.to(query.dtype), dlandmarks.to(landmarks.dtype)
