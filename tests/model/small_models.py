"""Models small enough that a test takes milliseconds, of every variant."""

from dataclasses import replace

import torch

from hsa_compile.model.config import ModelConfig
from hsa_compile.model.transformer import HSATransformer

SMALL = ModelConfig(
    vocab_size=19,
    dim=24,
    num_lower_layers=2,
    num_groups=2,
    layers_per_group=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    window=7,
    ffn_dim=40,
    chunk_size=5,
    top_k=3,
    memory_heads=4,
    memory_kv_heads=2,
    memory_head_dim=8,
    retrieval_dim=10,
    retrieval_norm=True,
    encoder_ffn_dim=32,
    num_experts=4,
    experts_per_token=2,
    expert_dim=12,
    state_dim=8,
    mamba_head_dim=8,
    init_std=0.3,
)


def small_config(variant: str, **changes: object) -> ModelConfig:
    """The small config as another variant, with some fields changed."""
    return replace(SMALL, variant=variant, **changes)  # type: ignore[arg-type]


def build(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> HSATransformer:
    """A model with reproducible weights, in evaluation mode."""
    torch.manual_seed(seed)
    return HSATransformer(config).to(dtype).eval()
