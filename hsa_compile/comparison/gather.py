"""What one writes without the ops, in a few lines of PyTorch: gather what each token picked, or score everything."""

import torch
from torch import Tensor

from hsa_compile.autotune.bench.device import free_bytes
from hsa_compile.comparison.case import Case
from hsa_compile.comparison.choices import BOTH, DECODE, FORWARD, SELECT
from hsa_compile.comparison.contender import Contender
from hsa_compile.comparison.same_function import Function, same_function

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
