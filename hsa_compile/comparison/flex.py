"""PyTorch's FlexAttention with a block mask of the same picks: one softmax over a token's chunks together."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from hsa_compile.comparison.case import Call, Case, dense_work
from hsa_compile.comparison.choices import BOTH, FORWARD
from hsa_compile.comparison.contender import SPARSE, Contender
from hsa_compile.comparison.dense import call_of
from hsa_compile.comparison.gather import too_large
from hsa_compile.comparison.other_functions import check_other
from hsa_compile.paths import cxx_compiler

_BLOCK = 128  # tokens and keys: the granularity of FlexAttention's own masks


def flex_contenders() -> list[Contender]:
    """FlexAttention, where PyTorch compiles it."""
    return [
        Contender(
            name="FlexAttention",
            computes=SPARSE,
            make=_make_flex,
            check=check_other(SPARSE),
            why_not=_why_not_flex,
            kinds=(FORWARD, BOTH),
            effort=lambda case: dense_work(case).flops,  # among 128 tokens' picks are most of the chunks
        )
    ]


def block_mask(case: Case) -> BlockMask:
    """The picks as FlexAttention takes them: blocks that any of 128 tokens picked, and a mask by token inside them."""
    problem, indices = case.problem, case.attention.chunk_indices.long()
    B, T, H, _ = indices.shape
    slots = torch.where(indices >= 0, indices, problem.num_chunks)
    picked = torch.zeros(B, T, H, problem.num_chunks + 1, dtype=torch.bool, device=case.device)
    picked.scatter_(3, slots, torch.ones_like(slots, dtype=torch.bool))
    picked[..., -1] = False  # of empty slots, and of keys past the last whole chunk
    picked = picked.transpose(1, 2).contiguous()  # [B, H, T, N + 1]
    visited = _visited(picked, problem.chunk_size, problem.kv_len)  # [B, H, nQ, nKV]
    visited = visited.repeat_interleave(problem.group, dim=1).int()
    counts = visited.sum(dim=3, dtype=torch.int32)
    order = visited.argsort(dim=3, descending=True, stable=True).int()
    group, chunk_size, num_chunks = problem.group, problem.chunk_size, problem.num_chunks

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return picked[batch, head // group, query, (key // chunk_size).clamp(max=num_chunks)]

    return BlockMask.from_kv_blocks(
        counts,
        order,
        BLOCK_SIZE=_BLOCK,
        mask_mod=seen,
        seq_lengths=(T, problem.kv_len),
        compute_q_blocks=case.kind == BOTH,
    )


def _visited(picked: Tensor, chunk_size: int, kv_len: int) -> Tensor:
    """`[B, H, nQ, nKV]`: whether any token of a block picked any key of a block."""
    blocks = torch.nn.functional.pad(picked, (0, 0, 0, -picked.shape[2] % _BLOCK)).unflatten(2, (-1, _BLOCK)).any(3)
    chunks = torch.arange(kv_len, device=picked.device) // chunk_size
    keys = blocks[..., chunks.clamp(max=picked.shape[3] - 1)]  # [B, H, nQ, S]
    return torch.nn.functional.pad(keys, (0, -kv_len % _BLOCK)).unflatten(3, (-1, _BLOCK)).any(4)


def _make_flex(case: Case) -> Call:
    inputs, mask = case.attention, block_mask(case)
    q, k, v = (x.transpose(1, 2).contiguous() for x in (inputs.q, inputs.k, inputs.v))
    torch.compiler.reset()  # a mask is code to PyTorch, which after some kinds of it would compile no more
    attend: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    grouped = case.problem.group > 1

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, block_mask=mask, enable_gqa=grouped)

    return call_of(forward, q, k, v, case)


def _why_not_flex(case: Case) -> str | None:
    problem = case.problem
    if case.device.type == "cpu":
        if case.kind == BOTH:
            return "PyTorch has no backward of FlexAttention on a CPU"
        if cxx_compiler() is None:
            return "torch.compile needs a C++ compiler here"
    if problem.dtype == "float64":
        return "FlexAttention takes no float64"
    bits = problem.batch * problem.num_kv_heads * problem.seq_len * problem.num_chunks
    return too_large("the mask of its picks", bits * (1 + problem.chunk_size / _BLOCK), case.device)
