"""From the lower half's output to the memory: an encoder that makes each chunk keys, values and a landmark."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hsa_compile.model.attention import GroupedQueryAttention, attend
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.layers import RMSNorm, SwiGLU, rope_angles, rotate


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedChunks:
    """Chunks as the memory holds them.

    Attributes:
        k, v: `[..., C, H, D]`.
        landmarks: `[..., H, Dr]`.
    """

    k: Tensor
    v: Tensor
    landmarks: Tensor


class EncoderLayer(GroupedQueryAttention):
    """One bidirectional layer over a chunk; as in the authors' code, with biases on q, k and v.

    Args:
        config: of the model.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, bias=True)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config.dim, config.encoder_ffn_dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """`x [n, L, dim]`, one chunk a row → the same shape."""
        q, k, v = self.project(self.norm(x))
        q, k = rotate(q, *rope), rotate(k, *rope)
        x = x + self.o_proj(attend(q, k, v).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class ChunkEncoder(nn.Module):
    """Encodes whole chunks on their own (arXiv 2511.23319, section 3): positions restart in each.

    A learned CLS is appended to a chunk and its output, through a linear layer, is the chunk's landmark; keys and
    values come from the outputs at the tokens, keys with QK norm. In DRT the chunk's last token is the landmark
    token and takes the place of the CLS.

    Args:
        config: of the model.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_kv_heads, self.head_dim = config.memory_kv_heads, config.memory_head_dim
        self.retrieval_dim, self.encoder_head_dim = config.retrieval_dim, config.head_dim
        self.rope_theta = config.rope_theta
        self.cls = None if config.has_landmark_tokens else nn.Parameter(torch.zeros(config.dim))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.k_proj = nn.Linear(config.dim, config.memory_kv_heads * config.memory_head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.memory_kv_heads * config.memory_head_dim, bias=False)
        self.k_norm = RMSNorm(config.memory_head_dim, config.norm_eps)
        self.landmark_proj = nn.Linear(config.dim, config.memory_kv_heads * config.retrieval_dim, bias=False)
        self.landmark_norm = RMSNorm(config.retrieval_dim, config.norm_eps) if config.retrieval_norm else nn.Identity()

    def forward(self, chunks: Tensor) -> EncodedChunks:
        """`chunks [..., C, dim]`, outputs of the lower half → keys, values and landmarks."""
        *shape, num_tokens, dim = chunks.shape
        x = chunks.reshape(math.prod(shape), num_tokens, dim)
        if self.cls is not None:
            x = torch.cat((x, self.cls.to(x.dtype).expand(x.shape[0], 1, dim)), dim=1)
        positions = torch.arange(x.shape[1], device=x.device)[None]
        rope = rope_angles(positions, self.encoder_head_dim, self.rope_theta, x.dtype)
        for layer in self.layers:
            x = layer(x, rope)
        x = self.norm(x)
        tokens = x[:, :num_tokens]
        heads = (*shape, num_tokens, self.num_kv_heads, self.head_dim)
        return EncodedChunks(
            k=self.k_norm(self.k_proj(tokens).view(heads)),
            v=self.v_proj(tokens).view(heads),
            landmarks=self.landmark_norm(
                self.landmark_proj(x[:, -1]).view(*shape, self.num_kv_heads, self.retrieval_dim)
            ),
        )
