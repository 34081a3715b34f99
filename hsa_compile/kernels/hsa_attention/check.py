"""The check of a kernel of `hsa_attention` or its backward: before it is timed, it must agree with the reference."""

import functools
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hsa_compile.errors import NotFinite
from hsa_compile.kernels.compare import TOLERANCES, compare
from hsa_compile.kernels.compile import Kernel
from hsa_compile.kernels.hsa_attention.inputs import Inputs, make_inputs
from hsa_compile.kernels.hsa_attention.reference import hsa_attention_reference
from hsa_compile.problem import Problem

RESULT_NAMES = {"hsa_forward": ("o",), "hsa_backward": ("dq", "dk", "dv", "dw")}

_SMALL_TOKENS = 200  # tokens of the small problem: whole chunks, a tail and rows that see nothing
_SAMPLED_TOKENS = 64  # tokens of the full problem that are compared


class _Sample(NamedTuple):
    """A part of one result of the full problem, and what the reference gives for it."""

    name: str
    at: Any  # the index of the part in the result
    expected: Tensor
    where: str


# The samples of inputs that are still in use: all candidates of a search are compared with the same ones.
_samples: WeakKeyDictionary[Inputs, dict[Problem, list[_Sample]]] = WeakKeyDictionary()


def check_attention(kernel: Kernel, problem: Problem, inputs: Inputs) -> None:
    """Compares a kernel on a small problem with every oddity, then on a sample of the full problem.

    The full problem is too large for the reference. So outputs, dq and dw are compared on some tokens; dk and dv are
    compared on two chunks, the last that the middle token picked and the last that any token picked, where the
    reference gets the tokens that picked them. All of each result must be finite.

    Args:
        kernel: what is checked; it computes `problem.op`.
        problem: what it is to be timed on.
        inputs: the tensors it is to be timed on.

    Raises:
        WrongResult: a result is not finite or too far off; the message names it and the error.
    """
    small, small_inputs, expected = _small_case(problem, inputs.q.device)
    tolerance = TOLERANCES[problem.dtype]
    for name, one, other in zip(RESULT_NAMES[small.op], _run(kernel, small_inputs), expected, strict=True):
        compare(name, one, other, tolerance, "a small odd shape")
    results = dict(zip(RESULT_NAMES[problem.op], _run(kernel, inputs), strict=True))
    for name, result in results.items():
        if not result.isfinite().all():
            raise NotFinite(f"{name} has values that are not finite")
    known = _samples.setdefault(inputs, {})
    if problem not in known:
        known[problem] = _sample(problem, inputs)
    for sample in known[problem]:
        compare(sample.name, results[sample.name][sample.at], sample.expected, tolerance, sample.where)


def _sample(problem: Problem, inputs: Inputs) -> list[_Sample]:
    """Computes with the reference the parts that are compared: some tokens, and gradients of some chunks."""
    count = min(_SAMPLED_TOKENS, problem.seq_len)
    tokens = torch.linspace(0, problem.seq_len - 1, count, dtype=torch.float64).long().unique()
    expected = dict(
        zip(RESULT_NAMES[problem.op], _reference(problem.op, _at_tokens(inputs, tokens), problem), strict=True)
    )
    at = (slice(None), tokens)
    if problem.op == "hsa_forward":
        return [_Sample("o", at, expected["o"], "sampled tokens")]
    samples = [_Sample(name, at, expected[name], "sampled tokens") for name in ("dq", "dw")]
    middle = int(inputs.chunk_indices[0, problem.seq_len // 2].max())
    for chunk in sorted({middle, int(inputs.chunk_indices.max())} - {-1}):
        keys = slice(chunk * problem.chunk_size, (chunk + 1) * problem.chunk_size)
        dk_chunk, dv_chunk = _gradients_of_chunk(problem, inputs, chunk)
        for name, one in (("dk", dk_chunk), ("dv", dv_chunk)):
            samples.append(_Sample(name, (slice(None), keys), one, f"chunk {chunk}"))
    return samples


def _gradients_of_chunk(problem: Problem, inputs: Inputs, chunk: int) -> tuple[Tensor, ...]:
    """dk and dv of one chunk, head by head: what 32 heads gather of long lists at once fills a GPU's memory."""
    parts: list[tuple[Tensor, Tensor]] = []
    for head in range(problem.num_kv_heads):
        one = _only_head(inputs, head)
        if (one.chunk_indices == chunk).any():
            _, dk, dv, _ = _reference(problem.op, _only_chunk(one, chunk, problem.chunk_size), problem)
        else:
            dk, dv = (torch.zeros_like(x[:, : problem.chunk_size], dtype=torch.float64) for x in (one.k, one.v))
        parts.append((dk, dv))
    return tuple(torch.cat(heads, dim=2) for heads in zip(*parts, strict=True))


def _only_head(inputs: Inputs, head: int) -> Inputs:
    """One kv head, and the query heads that share it."""
    group = inputs.q.shape[2] // inputs.k.shape[2]
    queries, keys = slice(head * group, (head + 1) * group), slice(head, head + 1)
    weights = queries if inputs.chunk_weights.shape[2] == inputs.q.shape[2] else keys
    return Inputs(
        q=inputs.q[:, :, queries],
        k=inputs.k[:, :, keys],
        v=inputs.v[:, :, keys],
        chunk_indices=inputs.chunk_indices[:, :, keys],
        chunk_weights=inputs.chunk_weights[:, :, weights],
        grad_o=inputs.grad_o[:, :, queries],
    )


def _only_chunk(inputs: Inputs, chunk: int, chunk_size: int) -> Inputs:
    """Returns inputs whose only keys are one chunk, and whose tokens are those that picked it, without other slots."""
    matches = inputs.chunk_indices == chunk  # [B, T, H, K]
    tokens = matches.any(dim=-1).any(dim=-1).any(dim=0).nonzero().flatten()
    matches = matches[:, tokens]
    slots = matches.int().argsort(dim=-1, descending=True, stable=True)[..., : int(matches.sum(dim=-1).max())]
    group = inputs.chunk_weights.shape[2] // slots.shape[2]
    weights = inputs.chunk_weights[:, tokens].gather(3, slots.repeat_interleave(group, dim=2))
    keys = slice(chunk * chunk_size, (chunk + 1) * chunk_size)
    return replace(
        _at_tokens(inputs, tokens),
        k=inputs.k[:, keys],
        v=inputs.v[:, keys],
        chunk_indices=torch.where(matches.gather(3, slots), 0, -1),
        chunk_weights=weights,
    )


@functools.lru_cache(maxsize=8)
def _small_case(problem: Problem, device: torch.device) -> tuple[Problem, Inputs, tuple[Tensor, ...]]:
    """Makes a short problem of the same kind with empty rows and duplicates, and what the reference gives for it."""
    kv_len = min(problem.kv_len, _SMALL_TOKENS + 3 * problem.chunk_size + 1)
    small = replace(
        problem, batch=min(problem.batch, 2), seq_len=min(problem.seq_len, _SMALL_TOKENS + 1), kv_len=kv_len
    )
    inputs = make_inputs(small, device, seed=1)
    indices = inputs.chunk_indices.clone()
    indices[:, ::7] = -1
    indices[:, 1::5, :, -1] = indices[:, 1::5, :, 0]
    inputs = inputs.with_indices(indices)
    return small, inputs, _reference(small.op, inputs, small)


def _at_tokens(inputs: Inputs, tokens: Tensor) -> Inputs:
    tokens = tokens.to(inputs.q.device)
    return replace(
        inputs,
        q=inputs.q[:, tokens],
        chunk_indices=inputs.chunk_indices[:, tokens],
        chunk_weights=inputs.chunk_weights[:, tokens],
        grad_o=inputs.grad_o[:, tokens],
    )


def _run(kernel: Kernel, inputs: Inputs) -> tuple[Tensor, ...]:
    op = kernel.source.problem.op
    results = kernel.entry(*inputs.arguments(op), scale=inputs.q.shape[-1] ** -0.5)
    return results if isinstance(results, tuple) else (results,)


def _reference(op: str, inputs: Inputs, problem: Problem) -> tuple[Tensor, ...]:
    """Returns the results of `op` in float64: o, or (dq, dk, dv, dw)."""
    leaves = [x.double() for x in (inputs.q, inputs.k, inputs.v, inputs.chunk_weights)]
    if op == "hsa_backward":
        leaves = [x.requires_grad_() for x in leaves]
    q, k, v, weights = leaves
    options = {name: getattr(problem, name) for name in ("chunk_size", "softmax_off_by_one", "mask_last_token")}
    with torch.enable_grad():
        o = hsa_attention_reference(q, k, v, inputs.chunk_indices, weights, **options)
        if op == "hsa_forward":
            return (o,)
        # Where there is no whole chunk, o depends on no weight.
        return torch.autograd.grad(o, leaves, inputs.grad_o.double(), materialize_grads=True)
