"""The definitions of what is not the op: dense attention, and one softmax over the same chunks together."""

from collections.abc import Callable

import torch
from torch import Tensor

from hsa_compile.autotune.check import TOLERANCES, relative_error
from hsa_compile.comparison.case import Call, Case
from hsa_compile.comparison.choices import BOTH, DECODE
from hsa_compile.comparison.contender import DENSE
from hsa_compile.errors import NotFinite, WrongResult

_SAMPLED_TOKENS = 16
_LARGEST_SCORES = 1 << 25  # of the sampled tokens, in float64


def check_other(computes: str) -> Callable[[Case, Call], None]:
    """A check against the definition of `DENSE` or `SPARSE`: o, and dq where there is one, on some tokens.

    Tokens that picked nothing are left out: libraries differ in what they give there.
    """

    def check(case: Case, call: Call) -> None:
        results = call()
        tokens = sampled_tokens(case, computes)
        expected = definition(case, computes, tokens)
        for name, actual, wanted in zip(("o", "dq"), results, expected, strict=False):
            found = actual[:, tokens]
            if found.shape != wanted.shape:
                raise WrongResult(f"{name} has shape {list(found.shape)} on sampled tokens, not {list(wanted.shape)}")
            if not found.isfinite().all():
                raise NotFinite(f"{name} has values that are not finite on sampled tokens")
            error, limit = relative_error(found, wanted), TOLERANCES[case.problem.dtype]
            if not error <= limit:
                how_far = f"{error:.1e} (relative norm, at most {limit:.0e})"
                raise WrongResult(f"{name} is off by {how_far} on sampled tokens")

    return check


def sampled_tokens(case: Case, computes: str) -> Tensor:
    """Tokens spread over the sequence, the last among them; few enough to score them against all keys."""
    problem = case.problem
    scores = problem.batch * problem.num_heads * problem.kv_len
    count = max(1, min(_SAMPLED_TOKENS, problem.seq_len, _LARGEST_SCORES // scores))
    tokens = torch.linspace(problem.seq_len - 1, 0, count).long().unique().to(case.device)
    if computes != DENSE:
        some = (case.attention.chunk_indices[:, tokens] >= 0).any(dim=3).all(dim=2).all(dim=0)
        tokens = tokens[some]
    return tokens


def definition(case: Case, computes: str, tokens: Tensor) -> tuple[Tensor, ...]:
    """o `[B, tokens, HQ, Dv]` in float64, and dq of those tokens if gradients are asked for."""
    if case.kind == DECODE:
        inputs = case.decoding
        k, v = (pages_in_order(x, inputs.page_table) for x in (inputs.k_chunks, inputs.v_chunks))
        q, grad_o = inputs.q[:, tokens], None
    else:
        attention = case.attention
        q, k, v, grad_o = attention.q[:, tokens], attention.k, attention.v, attention.grad_o[:, tokens]
    q = q.double().requires_grad_(case.kind == BOTH)
    positions = tokens + case.problem.kv_len - case.problem.seq_len
    if computes == DENSE:
        allowed = (torch.arange(k.shape[1], device=q.device) <= positions[:, None])[None, :, None]  # [1, T, 1, S]
    else:
        allowed = allowed_keys(case, tokens)
    with torch.enable_grad():
        o = _one_softmax(q, k.double(), v.double(), allowed)
        if case.kind != BOTH or grad_o is None:
            return (o.detach(),)
        return (o.detach(), *torch.autograd.grad(o, q, grad_o.double()))


def allowed_keys(case: Case, tokens: Tensor) -> Tensor:
    """`[B, tokens, H, S]`: whether a token picked the chunk of a key."""
    indices = case.attention.chunk_indices[:, tokens].long()
    chunks = torch.arange(case.problem.kv_len, device=case.device) // case.problem.chunk_size
    picked = torch.zeros(*indices.shape[:3], case.problem.kv_len, dtype=torch.bool, device=case.device)
    for slot in indices.unbind(dim=3):
        picked |= slot.unsqueeze(3) == chunks
    return picked


def pages_in_order(pages: Tensor, page_table: Tensor | None) -> Tensor:
    """`[B, S, H, D]` from pages `[P, H, C, D]`, each sequence's in the order of its table."""
    ordered = pages.unsqueeze(0) if page_table is None else pages[page_table.long()]  # [B, N, H, C, D]
    return ordered.transpose(2, 3).flatten(1, 2)


def _one_softmax(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    grouped = q.unflatten(2, (k.shape[2], -1))
    logits = torch.einsum("bthgd,bshd->bthgs", grouped, k) * q.shape[3] ** -0.5
    attention = logits.masked_fill(~allowed.unsqueeze(3), float("-inf")).softmax(dim=-1)
    return torch.einsum("bthgs,bshd->bthgd", attention, v).flatten(2, 3)
