"""What every attention inside the model has in common: its projections, QK norm, and PyTorch's kernel."""

import torch.nn.functional as F
from torch import Tensor, nn

from hsa_compile.model.config import ModelConfig
from hsa_compile.model.layers import RMSNorm
from hsa_compile.model.precision import without_cpu_autocast


def attend(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """PyTorch's attention (SDPA) with grouped queries.

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
        config: of the model.
        bias: whether queries, keys and values have one.
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
        """`x [B, T, dim]` → q `[B, T, HQ, D]`, k and v `[B, T, H, D]`; q and k normalised."""
        q = self.q_proj(x).view(*x.shape[:2], self.num_heads, self.head_dim)
        k, v = (layer(x).view(*x.shape[:2], self.num_kv_heads, self.head_dim) for layer in (self.k_proj, self.v_proj))
        return self.q_norm(q), self.k_norm(k), v
