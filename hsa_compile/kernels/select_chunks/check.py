"""The check of a kernel of `select_chunks` or its backward.

Before it is timed, its picks must be the best there are, and its weights and gradients must agree with the reference.
"""

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hsa_compile.errors import NotFinite, WrongResult
from hsa_compile.kernels.compare import SCORE_TOLERANCE, TOLERANCES, WEIGHT_TOLERANCE, compare
from hsa_compile.kernels.compile import Kernel
from hsa_compile.kernels.gumbel import gumbel
from hsa_compile.kernels.select_chunks.inputs import SelectInputs, make_select_inputs
from hsa_compile.kernels.select_chunks.reference import select_weights_reference
from hsa_compile.problem import Problem

_SMALL_TOKENS, _SMALL_CHUNKS = 131, 37
_SAMPLED_TOKENS = 64


def check_select(kernel: Kernel, problem: Problem, inputs: SelectInputs) -> None:
    """Compares a kernel on a small problem with rows that see little or nothing, then on a sample of the full problem.

    Raises:
        WrongResult: a pick is not one of the best, or a result is too far off; the message names it.
    """
    for one, where in ((_small_case(problem, inputs.query.device), "a small odd shape"), (inputs, "sampled tokens")):
        results = kernel.entry(*one.arguments(problem.op), **one.options(problem.op))
        count = min(_SAMPLED_TOKENS, one.query.shape[1])
        tokens = torch.linspace(0, one.query.shape[1] - 1, count, dtype=torch.float64).long().unique()
        tokens = tokens.to(one.query.device)
        if problem.op == "select_chunks":
            _check_picks(results, one, tokens, problem, where)
        else:
            _check_gradients(results, one, tokens, problem, where)


@functools.lru_cache(maxsize=8)
def _small_case(problem: Problem, device: torch.device) -> SelectInputs:
    """Makes a small problem of the same kind that begins at position 0, so that the first rows see nothing."""
    small = replace(
        problem,
        batch=min(problem.batch, 2),
        seq_len=min(problem.seq_len, _SMALL_TOKENS),
        kv_len=min(problem.num_chunks, _SMALL_CHUNKS) * problem.chunk_size,
    )
    return replace(make_select_inputs(small, device, seed=1), offset=0)


def _check_picks(
    results: tuple[Tensor, Tensor], inputs: SelectInputs, tokens: Tensor, problem: Problem, where: str
) -> None:
    picks, weights = (x[:, tokens] for x in results)
    query, landmarks = inputs.query[:, tokens].double(), inputs.landmarks.double()
    indices = picks.div(problem.landmarks_per_chunk, rounding_mode="floor")
    num_chunks = landmarks.shape[1] // problem.landmarks_per_chunk
    visible = (inputs.positions()[tokens] // problem.chunk_size).clamp(max=num_chunks).view(1, -1, 1, 1)
    slot = torch.arange(problem.top_k, device=indices.device)
    if not ((indices >= 0) == (slot < visible)).all() or not (indices < visible).all():
        raise WrongResult(f"chunk_indices name chunks that are not visible, or too few, on {where}")
    if not ((indices[..., 1:] < indices[..., :-1]) | (indices[..., 1:] < 0)).all():
        raise WrongResult(f"chunk_indices do not fall on {where}")
    if num_chunks == 0:  # all slots are empty, as was just checked
        return
    of_landmarks = torch.einsum("bthd,bnhd->bthn", query, landmarks) * problem.head_dim**-0.5
    scores = of_landmarks.unflatten(3, (num_chunks, -1)).amax(4)
    behind = scores.gather(3, indices.clamp(min=0).long()) - of_landmarks.gather(3, picks.clamp(min=0).long())
    if (behind[indices >= 0] > SCORE_TOLERANCE * of_landmarks.abs().max().clamp(min=1)).any():
        raise WrongResult(f"a landmark was picked that is not the best of its chunk on {where}")
    chunks = torch.arange(num_chunks, device=indices.device)
    if inputs.noise_keys is not None:
        scores = scores + gumbel(inputs.noise_keys[:, tokens].unsqueeze(-1), chunks)
    scores = scores.masked_fill(chunks >= visible, float("-inf"))
    picked = scores.gather(3, indices.clamp(min=0).long()).masked_fill(indices < 0, float("inf"))
    left_out = scores.scatter(3, indices.clamp(min=0).long(), float("-inf")).amax(dim=3)
    gap = left_out - picked.amin(dim=3)
    largest = scores.masked_fill(scores.isinf(), 0).abs().max().clamp(min=1)
    if (gap > SCORE_TOLERANCE * largest).any():
        raise WrongResult(f"a chunk that was left out scores {float(gap.max()):.1e} more than one picked on {where}")
    expected = select_weights_reference(query, landmarks, picks, fusion=problem.fusion)
    compare("chunk_weights", weights, expected, WEIGHT_TOLERANCE, where)


def _check_gradients(
    results: tuple[Tensor, Tensor], inputs: SelectInputs, tokens: Tensor, problem: Problem, where: str
) -> None:
    dquery, dlandmarks = results
    tolerance = TOLERANCES[problem.dtype]
    for name, x in (("dquery", dquery), ("dlandmarks", dlandmarks)):
        if not x.isfinite().all():
            raise NotFinite(f"{name} has values that are not finite")
    expected, _ = _reference_gradients(_at_tokens(inputs, tokens), problem)
    compare("dquery", dquery[:, tokens], expected, tolerance, where)
    # The reference gets all tokens that picked one landmark: its gradient is then whole.
    landmark = int(inputs.landmark_indices[0, inputs.query.shape[1] // 2].max())
    picked = (inputs.landmark_indices == landmark).any(dim=-1).any(dim=-1).any(dim=0).nonzero().flatten()
    if landmark >= 0:
        _, expected = _reference_gradients(_at_tokens(inputs, picked), problem)
        compare("dlandmarks", dlandmarks[:, landmark], expected[:, landmark], tolerance, f"landmark {landmark}")


def _at_tokens(inputs: SelectInputs, tokens: Tensor) -> SelectInputs:
    fields: dict[str, Any] = {
        name: getattr(inputs, name)[:, tokens] for name in ("query", "landmark_indices", "grad_weights")
    }
    return replace(inputs, **fields)


def _reference_gradients(inputs: SelectInputs, problem: Problem) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        query = inputs.query.double().requires_grad_()
        landmarks = inputs.landmarks.double().requires_grad_()
        weights = select_weights_reference(query, landmarks, inputs.landmark_indices, fusion=problem.fusion)
        dquery, dlandmarks = torch.autograd.grad(weights, (query, landmarks), inputs.grad_weights.double())
        return dquery, dlandmarks
