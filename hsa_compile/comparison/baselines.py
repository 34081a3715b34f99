"""What people run today, as contenders: PyTorch's dense attention, FlexAttention, and native sparse attention (NSA).

None of them computes our op: each is checked against its own definition, dense or with one softmax over all picks.
"""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from hsa_compile.comparison import BOTH, DECODE, FORWARD
from hsa_compile.comparison.contender import DENSE, SPARSE, Call, Case, Contender, available, dense_work
from hsa_compile.comparison.same_function import too_large
from hsa_compile.errors import NotFinite, WrongResult
from hsa_compile.kernels.compare import TOLERANCES, relative_error
from hsa_compile.paths import cxx_compiler

_SAMPLED_TOKENS = 16
_LARGEST_SCORES = 1 << 25  # the most scores of sampled tokens that are made in float64
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
_BLOCK = 128  # tokens and keys in a block, which is the granularity of FlexAttention's own masks
_LEAST_GROUP = 16


def check_other(computes: str) -> Callable[[Case, Call], None]:
    """Makes a check against the definition of `DENSE` or `SPARSE`: o, and dq where there is one, on some tokens.

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
    """Picks tokens spread over the sequence, the last among them; few enough to score them against all keys."""
    problem = case.problem
    scores = problem.batch * problem.num_heads * problem.kv_len
    count = max(1, min(_SAMPLED_TOKENS, problem.seq_len, _LARGEST_SCORES // scores))
    tokens = torch.linspace(problem.seq_len - 1, 0, count, dtype=torch.float64).long().unique().to(case.device)
    if computes != DENSE:
        some = (case.attention.chunk_indices[:, tokens] >= 0).any(dim=3).all(dim=2).all(dim=0)
        tokens = tokens[some]
    return tokens


def definition(case: Case, computes: str, tokens: Tensor) -> tuple[Tensor, ...]:
    """Returns o `[B, tokens, HQ, Dv]` in float64, and dq of those tokens if gradients are asked for."""
    if case.kind == DECODE:
        inputs = case.decoding
        k, v = (pages_in_order(x, inputs.page_table) for x in (inputs.k_chunks, inputs.v_chunks))
        q, grad_o = inputs.q[:, tokens], None
    else:
        attention = case.attention
        q, k, v, grad_o = attention.q[:, tokens], attention.k, attention.v, attention.grad_o[:, tokens]
    q = q.double().requires_grad_(case.kind == BOTH)
    positions = tokens + max(0, case.problem.kv_len - case.problem.seq_len)
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
    """Returns `[B, tokens, H, S]`: whether a token picked the chunk of a key."""
    indices = case.attention.chunk_indices[:, tokens].long()
    chunks = torch.arange(case.problem.kv_len, device=case.device) // case.problem.chunk_size
    picked = torch.zeros(*indices.shape[:3], case.problem.kv_len, dtype=torch.bool, device=case.device)
    for slot in indices.unbind(dim=3):
        picked |= slot.unsqueeze(3) == chunks
    return picked


def pages_in_order(pages: Tensor, page_table: Tensor | None) -> Tensor:
    """Returns `[B, S, H, D]` from pages `[P, H, C, D]`, those of each sequence in the order of its table."""
    ordered = pages.unsqueeze(0) if page_table is None else pages[page_table.long()]  # [B, N, H, C, D]
    return ordered.transpose(2, 3).flatten(1, 2)


def _one_softmax(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    grouped = q.unflatten(2, (k.shape[2], -1))
    logits = torch.einsum("bthgd,bshd->bthgs", grouped, k) * q.shape[3] ** -0.5
    attention = logits.masked_fill(~allowed.unsqueeze(3), float("-inf")).softmax(dim=-1)
    return torch.einsum("bthgs,bshd->bthgd", attention, v).flatten(2, 3)


def dense_contenders(device: torch.device) -> list[Contender]:
    """Returns causal attention to everything, which one runs who has no sparse attention."""
    if device.type == "cpu":
        return [_contender("SDPA", None)]
    return [_contender(f"SDPA {name}", name) for name in _BACKENDS]


def _contender(name: str, backend: str | None) -> Contender:
    return Contender(
        name=name,
        computes=DENSE,
        make=functools.partial(_make_dense, backend),
        check=check_other(DENSE),
        why_not=_scores_too_large if backend == "math" else available,
        kinds=(FORWARD, BOTH, DECODE),
        work=dense_work,
    )


def _make_dense(backend: str | None, case: Case) -> Call:
    """Makes a call on tensors that lie as `[B, HQ, T, D]`; its results lie as ours do."""
    if case.kind == DECODE:
        inputs = case.decoding
        tensors = (inputs.q, *(pages_in_order(x, inputs.page_table) for x in (inputs.k_chunks, inputs.v_chunks)))
    else:
        tensors = (case.attention.q, case.attention.k, case.attention.v)
    q, k, v = (x.transpose(1, 2).contiguous() for x in tensors)
    if backend == "efficient":  # it knows no groups
        k, v = (x.repeat_interleave(case.problem.group, dim=1) for x in (k, v))
    T, S = q.shape[2], k.shape[2]
    # The queries are the last positions, and the last of all sees every key; PyTorch takes them for the first.
    mask, causal = (causal_lower_right(T, S), False) if 1 < T < S else (None, T > 1)
    chosen: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    if backend is not None:
        chosen = functools.partial(sdpa_kernel, _BACKENDS[backend])

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with chosen():
            grouped = q.shape[1] != k.shape[1]
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)

    return call_of(forward, q, k, v, case)


def call_of(forward: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, case: Case) -> Call:
    """Makes a call of a function of q, k and v `[B, H, T, D]`; it gives o, and dq if asked for, as `[B, T, HQ, D]`."""

    def without_gradients() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (forward(q, k, v).transpose(1, 2),)

    if case.kind != BOTH:
        return without_gradients
    leaves = [x.requires_grad_() for x in (q, k, v)]
    grad_o = case.attention.grad_o.transpose(1, 2).contiguous()

    def with_gradients() -> tuple[Tensor, ...]:
        o = forward(*leaves)
        dq, _, _ = torch.autograd.grad(o, leaves, grad_o)
        return (o.detach().transpose(1, 2), dq.transpose(1, 2))

    return with_gradients


def _scores_too_large(case: Case) -> str | None:
    problem = case.problem
    scores = problem.batch * problem.num_heads * problem.seq_len * problem.kv_len
    copies = 4 if case.kind == BOTH else 2
    return too_large("its score matrix", copies * scores * problem.itemsize, case.device)


def flex_contenders() -> list[Contender]:
    """Returns FlexAttention, where PyTorch compiles it."""
    return [
        Contender(
            name="FlexAttention",
            computes=SPARSE,
            make=_make_flex,
            check=check_other(SPARSE),
            why_not=_why_not_flex,
            kinds=(FORWARD, BOTH),
            effort=lambda case: dense_work(case).flops,  # the picks of 128 tokens together are most of the chunks
        )
    ]


def block_mask(case: Case) -> BlockMask:
    """Turns the picks into FlexAttention's mask: blocks that any of 128 tokens picked, and by token inside them."""
    problem, indices = case.problem, case.attention.chunk_indices.long()
    B, T, H, _ = indices.shape
    slots = torch.where(indices >= 0, indices, problem.num_chunks)
    picked = torch.zeros(B, T, H, problem.num_chunks + 1, dtype=torch.bool, device=case.device)
    picked.scatter_(3, slots, torch.ones_like(slots, dtype=torch.bool))
    picked[..., -1] = False  # empty slots, and keys past the last whole chunk, are not picked
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
    """Returns `[B, H, nQ, nKV]`: whether any token of a block picked any key of a block."""
    blocks = torch.nn.functional.pad(picked, (0, 0, 0, -picked.shape[2] % _BLOCK)).unflatten(2, (-1, _BLOCK)).any(3)
    chunks = torch.arange(kv_len, device=picked.device) // chunk_size
    keys = blocks[..., chunks.clamp(max=picked.shape[3] - 1)]  # [B, H, nQ, S]
    return torch.nn.functional.pad(keys, (0, -kv_len % _BLOCK)).unflatten(3, (-1, _BLOCK)).any(4)


def _make_flex(case: Case) -> Call:
    inputs, mask = case.attention, block_mask(case)
    q, k, v = (x.transpose(1, 2).contiguous() for x in (inputs.q, inputs.k, inputs.v))
    torch.compiler.reset()  # to PyTorch a mask is code, and after some kinds of it PyTorch would compile no more
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


def nsa_contenders() -> list[Contender]:
    """Returns the selected branch of `fla.ops.nsa`, where it is installed."""
    return [
        Contender(
            name="fla NSA",
            computes=SPARSE,
            make=_make_nsa,
            check=check_other(SPARSE),
            why_not=_why_not_nsa,
            kinds=(FORWARD, BOTH),
        )
    ]


def _make_nsa(case: Case) -> Call:
    nsa = importlib.import_module("fla.ops.nsa")
    inputs, problem = case.attention, case.problem
    indices = inputs.chunk_indices.long()

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nsa.parallel_nsa(
            q, k, v, block_indices=indices, block_counts=problem.top_k, block_size=problem.chunk_size
        )

    def without_gradients() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (forward(inputs.q, inputs.k, inputs.v),)

    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]

    def with_gradients() -> tuple[Tensor, ...]:
        o = forward(*leaves)
        dq, _, _ = torch.autograd.grad(o, leaves, inputs.grad_o)
        return (o.detach(), dq)

    return with_gradients if case.kind == BOTH else without_gradients


def _why_not_nsa(case: Case) -> str | None:
    if case.device.type != "cuda":
        return "its kernels need a GPU"
    if importlib.util.find_spec("fla") is None:
        return "not installed: pip install flash-linear-attention"
    group = case.problem.group
    if group < _LEAST_GROUP or group & (group - 1):
        return f"it needs a group that is a power of two from {_LEAST_GROUP} on, not {group}"
    return None
