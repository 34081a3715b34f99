"""HSA as `attn_implementation="hsa"`: the attention of any causal model of `transformers` whose layers ask for one.

A token attends in full to the keys of its own chunk up to itself and of the `window_chunks` chunks before that. Among
all earlier chunks it attends to the `top_k` whose landmarks score highest, where the landmark of a chunk is the mean of
its keys. One softmax covers both, except that a picked chunk's share of it is estimated from its landmark:

    L   = logsumexp over the keys j of the window of scale · q·k_j
    s_i = log C + scale · q·landmark_i                        for the picked chunks i
    o   = (exp(L) · o_window + Σ_i exp(s_i) · o_i) / (exp(L) + Σ_i exp(s_i))

`o_window` and `o_i` are the softmax attention within the window and within chunk i. The heads of a group pick together,
by the sum of their queries. No weights are added: a text as long as the window gets full attention, and a longer one
gets what full attention gives if the keys within each chunk are equal and all chunks are picked. Gradients reach
queries, keys and values by all three lines; the choice has none.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function

from hsa_compile.checks import check_count
from hsa_compile.errors import InvalidArgument
from hsa_compile.kernels.hsa_attention.op import hsa_attention
from hsa_compile.kernels.select_chunks.op import select_chunks
from hsa_compile.model.hf.cache import first_tokens
from hsa_compile.problem import MAX_CHUNK_SIZE, MAX_SELECTED

NAME = "hsa"
_SIZES = "hsa_attention"  # the attribute of a model's config that holds the sizes, a dict
# What `transformers` hands to every attention function, and what this one does not compute.
_REFUSED = ("sliding_window", "softcap", "s_aux", "position_bias", "cu_seq_lens_q", "cu_seq_lens_k")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSizes:
    """How much a token sees, from the dict `hsa_attention` of a model's config.

    Attributes:
        chunk_size: `C`.
        top_k: how many chunks before the window a token picks.
        window_chunks: how many chunks before its own one a token sees in full.

    Raises:
        InvalidArgument: a value is out of range.
    """

    chunk_size: int = 64
    top_k: int = 16
    window_chunks: int = 8

    def __post_init__(self) -> None:
        check_count("chunk_size", self.chunk_size, 1, MAX_CHUNK_SIZE)
        check_count("top_k", self.top_k, 1, MAX_SELECTED)
        check_count("window_chunks", self.window_chunks, 0, 2**20)

    @classmethod
    def of(cls, config: Any) -> "AttentionSizes":
        """Reads the sizes of a model's config; those that it does not name have their defaults."""
        values = getattr(config, _SIZES, None) or {}
        names = [field.name for field in fields(cls)]
        if unknown := set(values) - set(names):
            raise InvalidArgument(f"{_SIZES} names {', '.join(sorted(unknown))}; allowed are {', '.join(names)}")
        return cls(**values)


def hsa_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Tensor | None:
    """Returns the mask that `hsa_attention_forward` takes, in the place of one for each pair of tokens.

    Returns:
        `[B, S]`, where padding is; None if no text has padding before it, since what follows a text changes nothing.

    Raises:
        InvalidArgument: the mask has a hole, or more than the causal order is asked for.
    """
    if mask_function is not causal_mask_function:
        raise InvalidArgument(
            f"attn_implementation = {NAME!r} takes whole causal texts, no packed ones and no other mask"
        )
    if int(q_offset) + q_length != kv_length:
        raise InvalidArgument(
            f"attn_implementation = {NAME!r} takes a cache that grows; this one has room for {kv_length} tokens and "
            f"holds {int(q_offset)}"
        )
    if attention_mask is None or first_tokens(attention_mask, (batch_size, kv_length)) is None:
        return None
    return attention_mask


def hsa_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Computes the attention of a layer, as `ALL_ATTENTION_FUNCTIONS` of `transformers` calls it.

    Args:
        module: the layer; its `config` has the sizes.
        query: `[B, HQ, T, D]`, the newest T tokens.
        key, value: `[B, H, S, D]`, of all tokens.
        attention_mask: what `hsa_mask` returned.
        scaling: factor of the logits; `D ** -0.5` if None.
        dropout: only 0 is allowed.
        others: what other functions take; what would change the result must be None.

    Returns:
        `[B, T, HQ, D]`, zeros at padding; and None, since there are no weights to show.

    Raises:
        InvalidArgument: something is asked for that this attention does not have.
    """
    asked = [name for name in _REFUSED if others.get(name) is not None]
    if dropout:
        asked.append("dropout")
    if not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        asked.append("is_causal = False")
    if attention_mask is not None and attention_mask.dim() != 2:
        asked.append("a mask for each pair of tokens")
    if asked:
        raise InvalidArgument(f"attn_implementation = {NAME!r} does not take {', '.join(asked)}")
    sizes = AttentionSizes.of(module.config)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if attention_mask is None:
        return attend_to_window_and_chunks(q, k, v, sizes, scale), None
    out = torch.zeros_like(q)
    past = k.shape[1] - q.shape[1]
    rows = []
    for b, first in enumerate(attention_mask.long().argmax(dim=1).tolist()):
        new = max(0, first - past)  # padding among the new tokens
        text = attend_to_window_and_chunks(q[b : b + 1, new:], k[b : b + 1, first:], v[b : b + 1, first:], sizes, scale)
        rows.append(torch.cat((out[b : b + 1, :new], text), dim=1))
    return torch.cat(rows), None


def attend_to_window_and_chunks(q: Tensor, k: Tensor, v: Tensor, sizes: AttentionSizes, scale: float) -> Tensor:
    """Computes what the head of this file says.

    Args:
        q: `[B, T, HQ, D]`, the newest T tokens.
        k, v: `[B, S, H, D]`, of all tokens.
        sizes: how much a token sees.
        scale: factor of the logits.

    Returns:
        `[B, T, HQ, D]`, in the dtype of q.
    """
    C, H = sizes.chunk_size, k.shape[2]
    past = k.shape[1] - q.shape[1]
    o, lse = _window(q, k, v, sizes, scale)
    skip = max(0, (sizes.window_chunks + 1) * C - past)  # new tokens before which no chunk is complete
    if skip >= q.shape[1]:
        return o
    q, near, lse = q[:, skip:], o[:, skip:], lse[:, skip:]
    N = k.shape[1] // C
    landmarks = k[:, : N * C].unflatten(1, (N, C)).mean(dim=2)  # [B, N, H, D]
    indices, _ = select_chunks(
        q.detach().unflatten(2, (H, -1)).sum(dim=3),
        landmarks.detach(),
        chunk_size=C,
        top_k=sizes.top_k,
        offset=past + skip - sizes.window_chunks * C,
    )
    shares = _scores(q, landmarks, indices) * scale + math.log(C)  # [B, T, HQ, K]
    total = torch.logaddexp(lse, shares.logsumexp(dim=-1))
    weights = (shares - total[..., None]).exp()
    far = hsa_attention(q.contiguous(), k.contiguous(), v.contiguous(), indices, weights, chunk_size=C, scale=scale)
    fused = (near * (lse - total).exp()[..., None]).to(o.dtype) + far
    return torch.cat((o[:, :skip], fused), dim=1)


def _window(q: Tensor, k: Tensor, v: Tensor, sizes: AttentionSizes, scale: float) -> tuple[Tensor, Tensor]:
    """Attends within the window, chunk of queries by chunk; returns `[B, T, HQ, D]` and the logsumexp `[B, T, HQ]`.

    It holds the scores of each token with the keys of its window, (window_chunks + 1) · C a head.
    """
    (B, T, HQ, D), H = q.shape, k.shape[2]
    C, width = sizes.chunk_size, (sizes.window_chunks + 1) * sizes.chunk_size
    past = k.shape[1] - T
    before, first = past % C, past // C - sizes.window_chunks  # queries of the chunk before; the first chunk of keys
    behind = -k.shape[1] % C
    queries = F.pad(q, (0, 0, 0, 0, before, behind)).view(B, -1, C, H, HQ // H, D)
    blocks = queries.shape[1]
    k, v = (
        F.pad(x[:, max(0, first) * C :], (0, 0, 0, 0, max(0, -first) * C, behind)).unfold(1, width, C) for x in (k, v)
    )  # [B, blocks, H, D, width]
    logits = torch.einsum("bnchgd,bnhdx->bnchgx", queries, k)
    logits = logits.to(torch.promote_types(q.dtype, torch.float32)) * scale
    token = torch.arange(C, device=q.device)[:, None] + sizes.window_chunks * C  # counted from the window's first key
    place = torch.arange(width, device=q.device)
    start = (first + torch.arange(blocks, device=q.device)[:, None]) * C  # the window's first key in the text
    hidden = (place > token) | (start + place < 0)[:, None]  # [blocks, C, width]
    logits = logits.masked_fill(hidden[:, :, None, None], float("-inf"))
    o = torch.einsum("bnchgx,bnhdx->bnchgd", logits.softmax(dim=-1).to(v.dtype), v)
    o, lse = o.reshape(B, blocks * C, HQ, D), logits.logsumexp(dim=-1).reshape(B, blocks * C, HQ)
    return o[:, before : before + T], lse[:, before : before + T]


def _scores(q: Tensor, landmarks: Tensor, indices: Tensor) -> Tensor:
    """Returns `q · landmark` of the picks `[B, T, HQ, K]`, −∞ in empty slots."""
    B, H = q.shape[0], landmarks.shape[2]
    batch = torch.arange(B, device=q.device).view(B, 1, 1, 1)
    head = torch.arange(H, device=q.device)[:, None]
    picked = landmarks[batch, indices.clamp(min=0).long(), head]  # [B, T, H, K, D]
    scores = torch.einsum("bthgd,bthkd->bthgk", q.unflatten(2, (H, -1)), picked)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    return scores.masked_fill((indices < 0)[:, :, :, None], float("-inf")).flatten(2, 3)
