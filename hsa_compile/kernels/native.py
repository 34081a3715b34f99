"""Builds emitted C++ into a shared library, once a machine, and calls it on tensors from all threads."""

import ctypes
import hashlib
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsa_compile.errors import CompileError
from hsa_compile.kernels.chunk_gradients import add_chunk_gradients
from hsa_compile.kernels.worker_pool import run_on_workers
from hsa_compile.paths import cxx_compiler
from hsa_compile.problem import Problem

# Flags of each vector extension, rather than -march=native: what is built depends on nothing that the source does
# not name, so a cache directory can be shared by machines.
_VECTOR_FLAGS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    "avx2": ("-mavx2", "-mfma"),
}
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=fast", "-fno-math-errno")
_BUILD_TIMEOUT_S = 300


def build_library(source: Path, arch: str) -> Path:
    """The file of an emitted C++ file's shared library, built if it is not there or not whole.

    Raises:
        CompileError: there is no compiler, or it refuses the file.
        OSError: the library cannot be written.
    """
    library, checksum = source.with_suffix(".so"), source.with_suffix(".so.sha256")
    try:
        whole = checksum.read_text() == _digest(library)
    except (FileNotFoundError, UnicodeDecodeError):
        whole = False
    if not whole:
        _build(source, library, arch)
        checksum.write_text(_digest(library))
    return library


def native_entry(library: ctypes.CDLL, problem: Problem, super_tile: int) -> Callable[..., Any]:
    """The library's function as a callable on tensors, with the signature of any other emitted entry."""
    run = _forward if problem.op == "hsa_forward" else _backward

    def entry(*tensors: Tensor, scale: float, chunk_starts: Tensor | None = None) -> Any:
        return run(library, problem, super_tile, tensors, chunk_starts, scale)

    return entry


def _build(source: Path, library: Path, arch: str) -> None:
    compiler = cxx_compiler()
    if compiler is None:
        raise CompileError("no C++ compiler is found (CXX, c++, g++ or clang++)")
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=f".{library.stem}.") as directory:
        built = Path(directory) / library.name
        command = [compiler, *_FLAGS, *_VECTOR_FLAGS.get(arch, ()), str(source), "-o", str(built)]
        try:
            # In a session of its own: Ctrl-C ends a search after the build, which would else look like a refusal.
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=False, start_new_session=True
            )
        except subprocess.TimeoutExpired as error:
            raise CompileError(f"{compiler} took more than {_BUILD_TIMEOUT_S} s for {source}") from error
        if done.returncode:
            raise CompileError(f"{compiler} refuses {source}: {done.stderr.strip()[-2000:]}")
        built.replace(library)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    """Where a tensor's elements begin; null for None."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def sizes(*values: int) -> list[ctypes.c_int64]:
    """Integers as the emitted functions take them."""
    return [ctypes.c_int64(value) for value in values]


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
        dk = torch.zeros(last_pair - first_pair + 1, num_chunks * problem.chunk_size, problem.head_dim)
        dv = torch.zeros(last_pair - first_pair + 1, num_chunks * problem.chunk_size, problem.value_dim)
        own = [pointer(x) for x in (dk, dv, dw)]
        library.hsa_backward(*before, *own, *lengths, ctypes.c_double(scale), *sizes(first, last))
        return first_pair, dk, dv

    parts = [part for _, _, part in run_on_workers(differentiate, batch * num_kv_heads * num_super_tiles)]
    dk = add_chunk_gradients(k, [(pair, dk) for pair, dk, _ in parts], problem.chunk_size, chunk_starts)
    dv = add_chunk_gradients(v, [(pair, dv) for pair, _, dv in parts], problem.chunk_size, chunk_starts)
    return dq.to(q.dtype), dk, dv, dw.to(weights.dtype)
