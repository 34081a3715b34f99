"""Functions with an op's own signature: they are bound to a case, and held to the op's definition like candidates."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hsa_compile.autotune.bench.device import free_bytes
from hsa_compile.comparison import BOTH, DECODE, FORWARD, KINDS, SELECT
from hsa_compile.comparison.contender import SAME, Call, Case, Contender, available
from hsa_compile.errors import WrongResult
from hsa_compile.kernels.compile import Kernel
from hsa_compile.kernels.emit import KernelSource
from hsa_compile.kernels.ops import check
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import Target

Function = Callable[..., Any]


def same_function(
    name: str,
    function: Callable[[Case], Function],
    *,
    why_not: Callable[[Case], str | None] = available,
    kinds: tuple[str, ...] = tuple(KINDS),
) -> Contender:
    """Makes a contender that claims to be the op itself.

    Args:
        name: the name that tables show.
        function: gives what computes a case, called as the op is: `hsa_attention`, `select_chunks` or `hsa_decode`.
        why_not, kinds: as in `Contender`.
    """
    return Contender(
        name=name,
        computes=SAME,
        make=lambda case: bind(function(case), case),
        check=lambda case, call: check_function(function(case), case),
        why_not=why_not,
        kinds=kinds,
    )


def bind(function: Function, case: Case) -> Call:
    """Makes a call of the function on the case's tensors, with gradients where the case asks for them."""
    tensors, options = case.inputs.call(case.problem)
    if case.kind == BOTH:
        return with_gradients(lambda leaves: function(*leaves[:3], tensors[3], leaves[3], **options), case)

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            found = function(*tensors, **options)
        return found if isinstance(found, tuple) else (found,)

    return call


def with_gradients(forward: Callable[[list[Tensor]], Tensor], case: Case) -> Call:
    """Makes a call of `forward` on q, k, v and weights, and of its backward."""
    inputs = case.attention
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.chunk_weights)]

    def call() -> tuple[Tensor, ...]:
        o = forward(leaves)
        return (o.detach(), *torch.autograd.grad(o, leaves, inputs.grad_o))

    return call


def check_function(function: Function, case: Case) -> None:
    """Holds a function to all that a candidate of the search is held to: a small odd shape, then the case itself.

    Raises:
        WrongResult: a result is not what the op is defined to give; the message names it and the error.
    """
    for op in case.ops:
        problem = case.problem.with_op(op)
        kernel = _as_kernel(function, problem)
        check(kernel, problem, case.inputs)


def _as_kernel(function: Function, problem: Problem) -> Kernel:
    """Puts the function in the place of an emitted entry, which gets the same tensors and other keywords."""
    entries = {
        "hsa_forward": _forward_entry,
        "hsa_backward": _backward_entry,
        "select_chunks": _select_entry,
        "hsa_decode": _decode_entry,
    }
    source = KernelSource(
        problem=problem,
        schedule=Schedule.of("none"),
        target=Target.parse("cpu"),
        backend="torch",
        text="",
        entry=problem.op,
        fingerprint="",
    )
    return Kernel(source=source, path=Path(), entry=entries[problem.op](function, problem), module=SimpleNamespace())


def _forward_entry(function: Function, problem: Problem) -> Function:
    def entry(*tensors: Tensor, scale: float) -> Tensor:
        del scale  # it is the op's own default
        with torch.no_grad():
            return _tensor("o", function(*tensors, chunk_size=problem.chunk_size))

    return entry


def _backward_entry(function: Function, problem: Problem) -> Function:
    def entry(
        q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor, grad_o: Tensor, *, scale: float
    ) -> tuple[Tensor, ...]:
        del scale
        leaves = [x.detach().requires_grad_() for x in (q, k, v, weights)]
        o = _tensor("o", function(*leaves[:3], indices, leaves[3], chunk_size=problem.chunk_size))
        if not o.requires_grad:
            raise WrongResult("o has no gradient, and forward and backward are asked for")
        return torch.autograd.grad(o, leaves, grad_o, materialize_grads=True)

    return entry


def _select_entry(function: Function, problem: Problem) -> Function:
    def entry(query: Tensor, landmarks: Tensor, noise: Tensor | None, *, top_k: int, offset: int) -> Any:
        assert noise is None
        assert offset == 0
        found = function(query, landmarks, chunk_size=problem.chunk_size, top_k=top_k)
        if not isinstance(found, tuple) or len(found) != 2:
            raise WrongResult(f"the result is a {type(found).__name__}, not a pair (chunk_indices, chunk_weights)")
        expected = [*query.shape[:3], top_k]
        for name, x in zip(("chunk_indices", "chunk_weights"), found, strict=True):
            if list(_tensor(name, x).shape) != expected:
                raise WrongResult(f"{name} has shape {list(x.shape)}, not {expected}")
        return found

    return entry


def _decode_entry(function: Function, problem: Problem) -> Function:
    def entry(*tensors: Tensor, scale: float, page_table: Tensor | None = None) -> Tensor:
        del scale
        o = _tensor("o", function(*tensors, page_table=page_table))
        expected = [*tensors[0].shape[:3], problem.value_dim]
        if list(o.shape) != expected:
            raise WrongResult(f"o has shape {list(o.shape)}, not {expected}")
        return o

    return entry


def _tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise WrongResult(f"{name} is a {type(value).__name__}, not a tensor")
    return value


_BLOCK_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}  # bytes gathered of keys and values at once; all would not fit
_LARGEST_SHARE = 0.5  # a share of the memory that is free


def gather_contenders() -> list[Contender]:
    """Returns gathering for attention and decoding, and dense scores for selection."""
    return [
        same_function("gather", _gather, why_not=_too_large, kinds=(FORWARD, BOTH, DECODE)),
        same_function("matmul + topk", lambda case: dense_topk, why_not=_too_many_scores, kinds=(SELECT,)),
    ]


def gather_attention(
    q: Tensor, k: Tensor, v: Tensor, chunk_indices: Tensor, chunk_weights: Tensor, *, chunk_size: int
) -> Tensor:
    """Computes hsa_attention by the definition, a block of tokens after the other."""
    row = chunk_indices[:, :1].numel() * chunk_size * (k.shape[3] + v.shape[3]) * k.element_size()
    step = max(1, _BLOCK_BYTES[q.device.type] // row)
    if k.requires_grad and k.element_size() < 4:  # otherwise a chunk's gradients would be summed up in 16 bits
        k, v = k.float(), v.float()
    num_chunks = k.shape[1] // chunk_size
    k_chunks, v_chunks = (  # [B, H, N, C, D]
        x[:, : num_chunks * chunk_size].unflatten(1, (num_chunks, chunk_size)).permute(0, 3, 1, 2, 4) for x in (k, v)
    )
    blocks = [slice(t, t + step) for t in range(0, q.shape[1], step)]
    parts = [_attend(q[:, b], k_chunks, v_chunks, chunk_indices[:, b], chunk_weights[:, b]) for b in blocks]
    return torch.cat(parts, dim=1)


def _attend(q: Tensor, k_chunks: Tensor, v_chunks: Tensor, chunk_indices: Tensor, chunk_weights: Tensor) -> Tensor:
    batch, num_kv_heads = k_chunks.shape[:2]
    picks = chunk_indices.transpose(1, 2).long()  # [B, H, T, K]
    b = torch.arange(batch, device=q.device).view(-1, 1, 1, 1)
    h = torch.arange(num_kv_heads, device=q.device).view(1, -1, 1, 1)
    k_picked, v_picked = (x[b, h, picks.clamp(min=0)].to(q.dtype) for x in (k_chunks, v_chunks))  # [B, H, T, K, C, D]
    grouped = q.unflatten(2, (num_kv_heads, -1)).transpose(1, 2)  # [B, H, T, G, D]
    logits = grouped @ k_picked.flatten(3, 4).transpose(3, 4) * q.shape[3] ** -0.5  # [B, H, T, G, K · C]
    attention = _wide(logits).unflatten(4, picks.shape[3:] + k_picked.shape[4:5]).softmax(dim=-1)
    weights = _wide(chunk_weights).unflatten(2, (num_kv_heads, -1)).transpose(1, 2)  # [B, H, T, G or 1, K]
    weights = torch.where((picks >= 0).unsqueeze(3), weights, 0)
    fused = (attention * weights.unsqueeze(-1)).flatten(4, 5).to(q.dtype)
    return (fused @ v_picked.flatten(3, 4)).transpose(1, 2).flatten(2, 3)


def _wide(x: Tensor) -> Tensor:
    """Widens to float32 at least, in which a softmax is taken."""
    return x.float() if x.element_size() < 4 else x


def gather_decode(
    q: Tensor,
    k_chunks: Tensor,
    v_chunks: Tensor,
    chunk_indices: Tensor,
    chunk_weights: Tensor,
    *,
    page_table: Tensor | None,
) -> Tensor:
    """Computes hsa_decode by indexing the pages."""
    pages = chunk_indices.long()
    if page_table is not None:
        listed = page_table.long().gather(1, pages.clamp(min=0).flatten(1)).view_as(pages)
        pages = torch.where(pages >= 0, listed, -1)
    num_kv_heads = k_chunks.shape[1]
    heads = torch.arange(num_kv_heads, device=q.device).view(1, 1, -1, 1)
    k_picked, v_picked = (x[pages.clamp(min=0), heads] for x in (k_chunks, v_chunks))  # [B, T, H, K, C, D]
    grouped = q.unflatten(2, (num_kv_heads, -1)).unsqueeze(3)  # [B, T, H, 1, G, D]
    logits = grouped @ k_picked.transpose(4, 5) * q.shape[3] ** -0.5  # [B, T, H, K, G, C]
    parts = _wide(logits).softmax(dim=-1).to(q.dtype) @ v_picked  # [B, T, H, K, G, Dv]
    weights = _wide(chunk_weights).unflatten(2, (num_kv_heads, -1)).transpose(3, 4).unsqueeze(-1)
    o = (parts * weights).masked_fill((pages < 0).unsqueeze(-1).unsqueeze(-1), 0).sum(dim=3)  # [B, T, H, G, Dv]
    return o.to(q.dtype).flatten(2, 3)


def dense_topk(query: Tensor, landmarks: Tensor, *, chunk_size: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Computes select_chunks by all scores, the causal mask and `topk`."""
    if query.dtype != torch.float64:
        query, landmarks = query.float(), landmarks.float()
    (_, seq_len, _, dim), num_chunks = query.shape, landmarks.shape[1]
    scores = query.transpose(1, 2) @ landmarks.permute(0, 2, 3, 1) * dim**-0.5  # [B, H, T, N]
    visible = torch.arange(seq_len, device=query.device)[:, None] // chunk_size
    scores = scores.masked_fill(torch.arange(num_chunks, device=query.device) >= visible, float("-inf"))
    best, indices = scores.topk(min(top_k, num_chunks), dim=-1)
    indices, order = torch.where(best.isinf(), -1, indices).sort(dim=-1, descending=True)
    best = best.gather(3, order)
    weights = best.masked_fill(best.isinf().all(dim=-1, keepdim=True), 0).softmax(dim=-1)
    missing = (0, top_k - indices.shape[3])
    weights = torch.nn.functional.pad(weights.masked_fill(indices < 0, 0), missing)
    indices = torch.nn.functional.pad(indices, missing, value=-1).int()
    return indices.transpose(1, 2), weights.transpose(1, 2)


def too_large(what: str, needed: float, device: torch.device) -> str | None:
    """Returns a reason to leave out what would need most of the memory that is free; None if it fits."""
    free = free_bytes(device)
    if free is None or needed <= _LARGEST_SHARE * free:
        return None
    return f"{what} would take about {needed / 2**30:.1f} GiB of {free / 2**30:.1f} GiB that are free"


def _gather(case: Case) -> Function:
    return gather_decode if case.kind == DECODE else gather_attention


def _too_large(case: Case) -> str | None:
    if case.kind != BOTH:  # one block after the other
        return None
    problem = case.problem
    rows = problem.batch * problem.seq_len * problem.top_k * problem.chunk_size
    picked = rows * problem.num_kv_heads * (problem.head_dim + problem.value_dim)
    scores = 3 * rows * problem.num_heads  # logits, softmax and its product with the weights
    return too_large("what it saves for backward", (picked + scores) * problem.itemsize, case.device)


def _too_many_scores(case: Case) -> str | None:
    problem = case.problem
    scores = problem.batch * problem.num_heads * problem.seq_len * problem.num_chunks
    return too_large("its score matrix", 3 * 4 * scores, case.device)
