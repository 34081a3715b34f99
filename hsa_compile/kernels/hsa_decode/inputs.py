"""The tensors that `hsa_decode` is tuned and checked on: a pool of pages, and tables that scatter sequences over it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hsa_compile.kernels.hsa_attention.inputs import pick_chunks
from hsa_compile.problem import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeInputs:
    """The arguments of the kernel of one decoding problem.

    Attributes:
        q `[B, T, HQ, D]`, k_chunks `[P, H, C, D]`, v_chunks `[P, H, C, Dv]`, chunk_indices `[B, T, H, K]` int32,
        chunk_weights `[B, T, H or HQ, K]` float32 (float64 for float64 problems), page_table `[B, N]` int32 or None.
    """

    q: Tensor
    k_chunks: Tensor
    v_chunks: Tensor
    chunk_indices: Tensor
    chunk_weights: Tensor
    page_table: Tensor | None

    def arguments(self, op: str) -> tuple[Tensor, ...]:
        """Returns the positional arguments of the emitted entry."""
        del op
        return (self.q, self.k_chunks, self.v_chunks, self.chunk_indices, self.chunk_weights)

    def options(self, op: str) -> dict[str, float | Tensor]:
        """Returns the keyword arguments of the emitted entry."""
        del op
        options: dict[str, float | Tensor] = {"scale": self.q.shape[-1] ** -0.5}
        return options if self.page_table is None else {**options, "page_table": self.page_table}

    def call(self, problem: Problem) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Returns the positional and keyword arguments of `hsa_decode`."""
        return self.arguments(problem.op), {"page_table": self.page_table}

    def filled(self) -> float:
        """Returns the share of the slots that hold a pick, 0 … 1."""
        return float((self.chunk_indices >= 0).double().mean())


def make_decode_inputs(
    problem: Problem, device: torch.device, *, distribution: str = "random", seed: int = 0
) -> DecodeInputs:
    """Makes random tensors of a problem's shapes; the pages of all sequences are shuffled if there is a table.

    Raises:
        InvalidArgument: the distribution is unknown.
    """
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, problem.dtype)
    B, T, H, N, C = problem.batch, problem.seq_len, problem.num_kv_heads, problem.num_chunks, problem.chunk_size
    weight_heads = problem.num_heads if problem.per_head_weights else H
    num_pages = B * N if problem.paged else N

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    indices = pick_chunks(problem, distribution, generator)
    scores = torch.randn(B, T, weight_heads, problem.top_k, generator=generator, device=device, dtype=torch.float32)
    table = None
    if problem.paged:
        table = torch.randperm(num_pages, generator=generator, device=device).view(B, N).to(torch.int32)
    return DecodeInputs(
        q=normal(B, T, problem.num_heads, problem.head_dim),
        k_chunks=normal(num_pages, H, C, problem.head_dim),
        v_chunks=normal(num_pages, H, C, problem.value_dim),
        chunk_indices=indices,
        chunk_weights=scores.softmax(dim=-1).to(torch.float64 if problem.dtype == "float64" else torch.float32),
        page_table=table,
    )
