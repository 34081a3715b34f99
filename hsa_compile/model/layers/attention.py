"""Attention inside the model: what all kinds share (projections, QK norm, PyTorch's kernel), and full attention."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsa_compile.model.config import ModelConfig
from hsa_compile.model.layers.basic import RMSNorm, rotate, without_cpu_autocast


def attend(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Computes PyTorch's attention (SDPA) with grouped queries.

    On a CPU, autocast is left out and the products are in float32: the backward pass in bfloat16 takes five times as
    long.

    Args:
        q: `[B, T, HQ, D]`.
        k, v: `[B, S, H, D]`.
        bias: added to the logits, broadcast to `[B, HQ, T, S]`; booleans say which keys are seen.
        is_causal: each token sees those up to itself; not with a bias.

    Returns:
        `[B, T, HQ, D]`.
    """
    context, (q, k, v) = without_cpu_autocast(q, k, v)
    with context:
        o = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=bias,
            is_causal=is_causal,
            enable_gqa=q.shape[2] != k.shape[2],
        )
    return o.transpose(1, 2)


class GroupedQueryAttention(nn.Module):
    """Queries, keys and values of an attention with fewer key/value heads than query heads, and its output layer.

    Args:
        config: the config of the model that the layer belongs to.
        bias: whether the projections to queries, keys and values have one.
    """

    def __init__(self, config: ModelConfig, *, bias: bool = False) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.dim, config.num_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.dim, config.num_kv_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.dim, config.num_kv_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.dim, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projects `x [B, T, dim]` to q `[B, T, HQ, D]` and to k and v `[B, T, H, D]`; q and k are normalised."""
        q = self.q_proj(x).view(*x.shape[:2], self.num_heads, self.head_dim)
        k, v = (layer(x).view(*x.shape[:2], self.num_kv_heads, self.head_dim) for layer in (self.k_proj, self.v_proj))
        return self.q_norm(q), self.k_norm(k), v


@dataclass(frozen=True, slots=True, kw_only=True)
class FullCache:
    """All keys and values of one layer so far.

    Attributes:
        k, v: `[B, S, H, D]`; the first `num_past[b]` rows of text b are filled.
    """

    k: Tensor
    v: Tensor


class FullAttention(GroupedQueryAttention):
    """Causal attention with grouped queries, QK norm and RoPE.

    Args:
        config: the config of the model that the layer belongs to.
    """

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: FullCache | None = None,
        num_past: Tensor | None = None,
        num_valid: Tensor | None = None,
    ) -> tuple[Tensor, FullCache | None]:
        """Attends within `x [B, T, dim]`, and to the cache where there is one.

        The arguments are those of `WindowAttention.forward`, except that `num_past` is given wherever there is a cache.
        """
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
        """Returns the cache before the first token, in the dtype and on the device of `like`."""
        shape = (batch, 0, self.num_kv_heads, self.head_dim)
        return FullCache(k=like.new_zeros(shape), v=like.new_zeros(shape))


def _inserted(cache: Tensor, new: Tensor, num_past: Tensor, num_valid: Tensor | None) -> Tensor:
    """Writes `new [B, T, …]` behind the rows of each text in `cache [B, S, …]`, which grows as far as needed.

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
