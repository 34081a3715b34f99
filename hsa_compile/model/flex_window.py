"""Sliding-window attention through PyTorch's FlexAttention: what runs on GPUs."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


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
    """As `window_attention`, whose arguments these are, in one fused kernel that visits only blocks of the window.

    Args:
        compiled: through `torch.compile`, which makes the kernel; eager execution, for tests, holds all scores.
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
