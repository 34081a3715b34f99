"""Attention to the whole past: the baseline that HSA is compared with."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hsa_compile.model.attention import GroupedQueryAttention, attend
from hsa_compile.model.layers import rotate


@dataclass(frozen=True, slots=True, kw_only=True)
class FullCache:
    """All keys and values of one layer so far.

    Attributes:
        k, v: `[B, S, H, D]`; of row b the first `num_past[b]` are there.
    """

    k: Tensor
    v: Tensor


class FullAttention(GroupedQueryAttention):
    """Causal attention with grouped queries, QK norm and RoPE.

    Args:
        config: of the model.
    """

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: FullCache | None = None,
        num_past: Tensor | None = None,
        num_valid: Tensor | None = None,
    ) -> tuple[Tensor, FullCache | None]:
        """Attends within `x [B, T, dim]`, and to the cache where there is one; arguments as of `WindowAttention`,
        but that `num_past` is given wherever there is a cache."""
        q, k, v = self.project(x)
        q, k = rotate(q, *rope), rotate(k, *rope)
        mask = None
        if cache is not None:
            assert num_past is not None
            cache = FullCache(
                k=_inserted(cache.k, k, num_past, num_valid), v=_inserted(cache.v, v, num_past, num_valid)
            )
            k, v = cache.k, cache.v
            last = num_past[:, None] + torch.arange(x.shape[1], device=x.device)  # the newest key that a query sees
            mask = (torch.arange(k.shape[1], device=x.device) <= last[:, :, None])[:, None]
        o = attend(q, k, v, bias=mask, is_causal=mask is None)
        return self.o_proj(o.flatten(2)), cache

    def empty_cache(self, batch: int, like: Tensor) -> FullCache:
        """The cache before the first token, in the dtype and on the device of `like`."""
        shape = (batch, 0, self.num_kv_heads, self.head_dim)
        return FullCache(k=like.new_zeros(shape), v=like.new_zeros(shape))


def _inserted(cache: Tensor, new: Tensor, num_past: Tensor, num_valid: Tensor | None) -> Tensor:
    """`cache [B, S, …]` with `new [B, T, …]` written behind the rows of each text, grown as far as needed.

    Rows of padding are written too: the next piece writes over them, and no query before that sees them.
    """
    T = new.shape[1]
    size = int(num_past.max()) + T
    if cache.shape[1] < size:
        cache = F.pad(cache, (0, 0, 0, 0, 0, size - cache.shape[1]))
    elif num_valid is None:
        cache = cache.clone()
    index = num_past[:, None] + torch.arange(T, device=new.device)
    return cache.scatter(1, index[:, :, None, None].expand_as(new), new)
