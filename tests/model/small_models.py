"""Models small enough that a test takes milliseconds, of every variant."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from hsa_compile.model.config import VARIANTS, ModelConfig
from hsa_compile.model.transformer import HSATransformer

SMALL = ModelConfig(
    vocab_size=19,
    dim=24,
    embedding_window=5,
    num_lower_layers=2,
    num_groups=2,
    layers_per_group=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    window=7,
    ffn_dim=40,
    chunk_size=6,
    top_k=3,
    memory_heads=4,
    memory_kv_heads=2,
    memory_head_dim=8,
    retrieval_dim=10,
    pooled_landmarks=2,
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
    model = HSATransformer(config)
    if model.chunk_encoder is not None and model.chunk_encoder.token_proj is not None:
        torch.nn.init.normal_(model.chunk_encoder.token_proj.weight, std=0.3)  # as if trained: at first it is zero
    return model.to(dtype).eval()


def combinations(*axes: Sequence[Any]) -> list[Any]:
    """Cases for `parametrize`: each value of each axis once; all other combinations are marked exhaustive."""
    once = {tuple(i % len(axis) for axis in axes) for i in range(max(map(len, axes)))}
    return [
        pytest.param(
            *(axis[i] for axis, i in zip(axes, place, strict=True)),
            marks=[] if place in once else [pytest.mark.exhaustive],
        )
        for place in product(*(range(len(axis)) for axis in axes))
    ]


def one_first(variant: str) -> list[Any]:
    """All variants for `parametrize`, where the given one stands for the others, which are marked exhaustive."""
    return [variant, *(pytest.param(other, marks=pytest.mark.exhaustive) for other in VARIANTS if other != variant)]
