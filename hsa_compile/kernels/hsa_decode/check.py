"""The check of a kernel of `hsa_decode`: before it is timed, it must agree with the float64 reference."""

import functools
from dataclasses import replace

import torch
from torch import Tensor

from hsa_compile.errors import NotFinite
from hsa_compile.kernels.compare import TOLERANCES, compare
from hsa_compile.kernels.compile import Kernel
from hsa_compile.kernels.hsa_decode.inputs import DecodeInputs, make_decode_inputs
from hsa_compile.kernels.hsa_decode.reference import hsa_decode_reference
from hsa_compile.problem import Problem

_SMALL_CHUNKS, _SMALL_TOKENS = 7, 5
_SAMPLED_SEQUENCES = 8
_POISON = float("nan")


def check_decode(kernel: Kernel, problem: Problem, inputs: DecodeInputs) -> None:
    """Compares a kernel on a small problem with every oddity, then on some sequences of the full problem.

    Raises:
        WrongResult: the result is not finite or too far off; the message says where and by how much.
    """
    small, expected = _small_case(problem, inputs.q.device)
    _compare(kernel, small, expected, problem, "a small odd shape")
    _compare(kernel, inputs, _reference(inputs, problem), problem, "sampled sequences")


@functools.lru_cache(maxsize=8)
def _small_case(problem: Problem, device: torch.device) -> tuple[DecodeInputs, Tensor]:
    """Makes a small problem of the same kind with every oddity, and what the reference gives for it."""
    small = replace(
        problem,
        batch=2,
        seq_len=min(problem.seq_len, _SMALL_TOKENS),
        kv_len=_SMALL_CHUNKS * problem.chunk_size,
    )
    inputs = _with_oddities(make_decode_inputs(small, device, seed=1))
    return inputs, _reference(inputs, problem)


def _with_oddities(inputs: DecodeInputs) -> DecodeInputs:
    """Repeats slots of sequence 0, empties sequence 1, and fills page 0, which no slot reaches, with NaN."""
    indices, weights, table = inputs.chunk_indices.clone(), inputs.chunk_weights.clone(), inputs.page_table
    indices[0, :, :, -1] = indices[0, :, :, 0]
    indices[1] = -1
    weights[1] = _POISON
    k_chunks, v_chunks = inputs.k_chunks.clone(), inputs.v_chunks.clone()
    k_chunks[0], v_chunks[0] = _POISON, _POISON
    if table is None:
        indices[indices == 0] = -1
    else:
        table = torch.where(table == 0, -1, table)
    return replace(
        inputs,
        k_chunks=k_chunks,
        v_chunks=v_chunks,
        chunk_indices=indices,
        chunk_weights=weights,
        page_table=table,
    )


def _compare(kernel: Kernel, inputs: DecodeInputs, expected: Tensor, problem: Problem, where: str) -> None:
    o = kernel.entry(*inputs.arguments(problem.op), **inputs.options(problem.op))
    if not o.isfinite().all():
        raise NotFinite(f"o has values that are not finite on {where}")
    compare("o", o[_sampled(inputs)], expected, TOLERANCES[problem.dtype], where)


def _sampled(inputs: DecodeInputs) -> Tensor:
    """Returns the numbers of the sequences that are compared."""
    some = torch.linspace(0, inputs.q.shape[0] - 1, _SAMPLED_SEQUENCES, dtype=torch.float64)
    return some.long().unique().to(inputs.q.device)


def _reference(inputs: DecodeInputs, problem: Problem) -> Tensor:
    """Returns o of some sequences in float64, from the pages that they pick alone, since the pool may be large."""
    sequences = _sampled(inputs)
    indices, weights = inputs.chunk_indices[sequences], inputs.chunk_weights[sequences].double()
    pages = indices.long()
    if inputs.page_table is not None:
        table = inputs.page_table[sequences].long()
        listed = table.gather(1, pages.clamp(min=0).flatten(1)).view_as(pages)
        pages = torch.where(pages >= 0, listed, -1)
    used, places = pages.unique(return_inverse=True)
    k_used, v_used = (x[used.clamp(min=0)].double() for x in (inputs.k_chunks, inputs.v_chunks))
    return hsa_decode_reference(
        inputs.q[sequences].double(),
        k_used,
        v_used,
        torch.where(pages >= 0, places, -1),
        weights,
        softmax_off_by_one=problem.softmax_off_by_one,
        mask_last_token=problem.mask_last_token,
    )
