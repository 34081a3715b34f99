"""Sliding-window attention: each token sees the last `window` tokens, at a cost linear in the length."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from hsa_compile.model.config import ModelConfig
from hsa_compile.model.layers.attention import GroupedQueryAttention, attend
from hsa_compile.model.layers.basic import kernel_dtype, rotate
from hsa_compile.model.layers.exchange import SharedRows

# A block of queries computes with its own keys and the window before them: small ones waste less, but hold more copies.
_SMALLEST_BLOCK, _LARGEST_BLOCK = 32, 128


def flex_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    num_past: Tensor | None = None,
    slopes: Tensor | None = None,
    compiled: bool = True,
) -> Tensor:
    """Computes `window_attention`, whose arguments it takes, in a fused kernel that visits only blocks of the window.

    Args:
        compiled: whether `torch.compile` makes the kernel; eager execution, for tests, holds all scores.
    """
    past = k.shape[1] - q.shape[1]
    mask = (
        _uncached_mask(q, k, window, num_past)
        if num_past is not None
        else _mask(q.shape[1], k.shape[1], window, q.device)
    )
    score_mod = _alibi(slopes, past) if slopes is not None else None
    attend: Any = _compiled() if compiled else flex_attention
    o = attend(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        score_mod=score_mod,
        block_mask=mask,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return o.transpose(1, 2)


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


@functools.lru_cache(maxsize=64)
def _mask(length: int, num_keys: int, window: int, device: torch.device) -> BlockMask:
    past = num_keys - length

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query + past - key
        return (distance >= 0) & (distance < window)

    return create_block_mask(seen, None, None, length, num_keys, device=device)


def _uncached_mask(q: Tensor, k: Tensor, window: int, num_past: Tensor) -> BlockMask:
    past = k.shape[1] - q.shape[1]

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query + past - key
        return (distance >= 0) & (distance < window) & (key >= past - num_past[batch])

    return create_block_mask(seen, q.shape[0], None, q.shape[1], k.shape[1], device=q.device)


def _alibi(slopes: Tensor, past: int) -> Callable[..., Tensor]:
    def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score - slopes[head] * (query + past - key)

    return biased


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, num_past: Tensor | None = None, slopes: Tensor | None = None
) -> Tensor:
    """Computes causal attention of each token to the last `window` ones; on a CPU, in blocks of queries.

    Args:
        q: `[B, T, HQ, D]`.
        k, v: `[B, P + T, H, D]`; the first P rows lie before the first query. `P` is 0 or at least `window − 1`.
        window: how many tokens are seen, the own one included.
        num_past: `[B]` integers: how many of the P rows, counted from their end, are really there; None if all are.
        slopes: `[HQ]`, ALiBi's factors of the distance (arXiv 2108.12409), or None for no such bias.

    Returns:
        `[B, T, HQ, D]`.
    """
    B, T, HQ, D = q.shape
    H, before = k.shape[2], window - 1
    past = k.shape[1] - T
    k, v = k[:, max(0, past - before) :], v[:, max(0, past - before) :]
    if T == 1 and past >= before and num_past is None:
        bias = _bias(1, before + 1, window, q, slopes)
        return attend(q, k, v, bias=bias)
    if q.device.type == "cuda":
        return flex_window_attention(q, k, v, window=window, num_past=num_past, slopes=slopes)
    window = max(1, min(window, k.shape[1]))  # a short text has no more to see, and no room is made for it
    before = window - 1
    block = T if T <= _SMALLEST_BLOCK else min(_LARGEST_BLOCK, max(_SMALLEST_BLOCK, 1 << (before // 8).bit_length()))
    num_blocks = -(-T // block)
    missing, filling = before - (k.shape[1] - T), num_blocks * block - T
    width = block + before
    if missing or filling:  # padding by nothing would copy
        q, k, v = F.pad(q, (0, 0, 0, 0, 0, filling)), *(F.pad(x, (0, 0, 0, 0, missing, filling)) for x in (k, v))
    k, v = (x.unfold(1, width, block) for x in (k, v))
    bias = _bias(block, width, window, q, slopes)[None, None]
    if missing or num_past is not None:
        bias = _hide_what_is_not_there(bias, num_past, block, num_blocks, before)
    queries = q.reshape(B * num_blocks, block, HQ, D)
    rows = (B * num_blocks, -1)
    o = attend(
        queries,
        k.permute(0, 1, 4, 2, 3).reshape(*rows, H, D),
        v.permute(0, 1, 4, 2, 3).reshape(*rows, H, D),
        bias=bias.expand(B, num_blocks, -1, -1, -1).flatten(0, 1),  # in 4 dimensions, or no fused kernel runs
    )
    return o.reshape(B, num_blocks * block, HQ, D)[:, :T]


def _bias(block: int, width: int, window: int, q: Tensor, slopes: Tensor | None) -> Tensor:
    """Returns what is added to the logits of one block: `[1, block, width]`, or `[HQ, block, width]` with slopes."""
    distance = (
        torch.arange(block, device=q.device)[:, None] + window - 1 - torch.arange(width, device=q.device)[None, :]
    )
    bias = torch.zeros(1, block, width, dtype=q.dtype, device=q.device)
    if slopes is not None:
        bias = -slopes.to(q.dtype)[:, None, None] * distance
    return bias.masked_fill((distance < 0) | (distance >= window), float("-inf"))


def _hide_what_is_not_there(bias: Tensor, num_past: Tensor | None, block: int, num_blocks: int, before: int) -> Tensor:
    """Hides keys before the beginning of the text from the bias; returns `[B or 1, num_blocks, heads, block, width]`.

    No query is left without a key: each sees itself.
    """
    there = num_past.clamp(max=before)[:, None] if num_past is not None else torch.zeros(1, 1, device=bias.device)
    first = torch.arange(num_blocks, device=bias.device)[:, None] * block
    column = first + torch.arange(block + before, device=bias.device)  # [num_blocks, width], 0 is the oldest key
    hidden = column[None] < (before - there)[:, :, None]  # [B or 1, num_blocks, width]
    return bias.masked_fill(hidden[:, :, None, None, :], float("-inf"))


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowCache:
    """The last `window − 1` keys and values of one layer, newest last.

    Attributes:
        k, v: `[B, window − 1, H, D]`; rows before the beginning of the text are zero.
    """

    k: Tensor
    v: Tensor


def appended(cache: Tensor, new: Tensor, num_valid: Tensor | None) -> Tensor:
    """Adds the first `num_valid[b]` rows of `new` (all if None) to `cache [B, P, …]` and returns the last P rows."""
    size = cache.shape[1]
    if num_valid is None and new.shape[1] >= size:
        return new[:, new.shape[1] - size :].clone()  # a view would keep the whole piece alive
    rows = torch.cat((cache, new), dim=1)
    if num_valid is None:
        return rows[:, rows.shape[1] - size :].clone()
    index = num_valid[:, None] + torch.arange(size, device=new.device)
    index = index.view(*index.shape, *[1] * (new.dim() - 2)).expand(-1, -1, *new.shape[2:])
    return rows.gather(1, index)


class WindowAttention(GroupedQueryAttention):
    """The sliding-window layer: grouped queries, QK norm, and RoPE, or ALiBi in DRT.

    Args:
        config: the config of the model that the layer belongs to.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.window = config.window
        self.alibi = config.variant == "drt"

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: WindowCache | None = None,
        num_past: Tensor | None = None,
        num_valid: Tensor | None = None,
        shared: SharedRows | None = None,
    ) -> tuple[Tensor, WindowCache | None]:
        """Attends within `x`, and to the cache where there is one.

        Args:
            x: `[B, T, dim]`.
            rope: cosines and sines `[B or 1, T, head_dim / 2]` of the positions.
            cache: the cache of what came before; None in training.
            num_past: `[B]`, how many tokens came before; None if at least `window − 1` did in each row.
            num_valid: `[B]`, how many rows of `x` are no padding; None if all are.
            shared: the part of the rows that `x` is, where processes share them; it takes the place of the cache.

        Returns:
            `[B, T, dim]`, and the cache after this piece (None if there was none).
        """
        q, k, v = self.project(x)
        slopes = None
        if self.alibi:
            slopes = alibi_slopes(self.num_heads, x.device)
        else:
            q, k = rotate(q, *rope), rotate(k, *rope)
        after = None
        if cache is not None:
            after = WindowCache(k=appended(cache.k, k, num_valid), v=appended(cache.v, v, num_valid))
            k, v = torch.cat((cache.k, k), dim=1), torch.cat((cache.v, v), dim=1)
        elif shared is not None:
            before = self.window - 1
            k = k.to(kernel_dtype(k))  # normalised in float32, which would send twice as much
            k, v = (torch.cat((shared.before(x, before), x), dim=1) for x in (k, v))
            if shared.start < before:
                num_past = torch.full((x.shape[0],), shared.start, device=x.device)
        o = window_attention(q, k, v, window=self.window, num_past=num_past, slopes=slopes)
        return self.o_proj(o.flatten(2)), after

    def empty_cache(self, batch: int, like: Tensor) -> WindowCache:
        """Returns the cache before the first token, in the dtype and on the device of `like`."""
        shape = (batch, self.window - 1, self.num_kv_heads, self.head_dim)
        return WindowCache(k=like.new_zeros(shape), v=like.new_zeros(shape))


def alibi_slopes(num_heads: int, device: torch.device) -> Tensor:
    """Returns ALiBi's factors `2^(−8 (i + 1) / heads)`, one a head (arXiv 2108.12409)."""
    return 2.0 ** (-8.0 * torch.arange(1, num_heads + 1, device=device, dtype=torch.float32) / num_heads)
