"""The presets: configs of models that have a name."""

from dataclasses import replace

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.config import VARIANTS, ModelConfig

# The smallest preset has about a million active parameters, reads bytes, and trains in minutes on two CPU cores.
_TINY = ModelConfig(
    vocab_size=256,
    dim=128,
    embedding_window=8,
    num_lower_layers=2,
    num_groups=1,
    layers_per_group=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    window=32,
    ffn_dim=384,
    chunk_size=32,
    top_k=8,
    memory_heads=4,
    memory_kv_heads=1,
    memory_head_dim=32,
    retrieval_dim=64,
    pooled_landmarks=8,
    encoder_ffn_dim=256,
    num_experts=8,
    experts_per_token=2,
    expert_dim=128,
    num_dense_layers=1,
    state_dim=32,
    init_std=0.05,
)

# About 30 million parameters, half of them active, with a MoE in all layers but the first; it needs one GPU and a day.
_SMALL = ModelConfig(
    vocab_size=256,
    dim=384,
    num_lower_layers=4,
    num_groups=1,
    layers_per_group=4,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
    window=128,
    ffn_dim=1024,
    chunk_size=32,
    top_k=16,
    memory_heads=6,
    memory_kv_heads=1,
    memory_head_dim=64,
    retrieval_dim=384,
    encoder_ffn_dim=1024,
    num_experts=8,
    experts_per_token=2,
    expert_dim=320,
)

# The ablation model of arXiv 2511.23319 in its published sizes; vocabulary and MLP width are ours: 346M.
_345M = ModelConfig(
    vocab_size=50_304,
    dim=1024,
    num_lower_layers=8,
    num_groups=2,
    layers_per_group=4,
    num_heads=16,
    num_kv_heads=2,
    head_dim=64,
    window=512,
    ffn_dim=4864,
    chunk_size=64,
    top_k=32,
    memory_heads=16,
    memory_kv_heads=1,
    memory_head_dim=64,
    retrieval_dim=1024,
    encoder_ffn_dim=2688,
)

# The dense model of arXiv 2511.23319; its parameters are as many as published.
_HALF_B = replace(
    _345M, vocab_size=157_184, num_lower_layers=12, layers_per_group=6, ffn_dim=4096, window=4096, top_k=64
)

# The MoE of arXiv 2511.23319; sizes that were not published are our guess. Embeddings left out, 8.08B in all and
# 0.91B active; 8.01B and 0.84B without the parts of the memory.
_8B_A1B = ModelConfig(
    vocab_size=157_184,
    dim=2048,
    num_lower_layers=10,
    num_groups=2,
    layers_per_group=5,
    num_heads=16,
    num_kv_heads=4,
    head_dim=128,
    window=4096,
    ffn_dim=5120,
    chunk_size=64,
    top_k=64,
    memory_heads=16,
    memory_kv_heads=1,
    memory_head_dim=128,
    retrieval_dim=1024,
    encoder_ffn_dim=5440,
    num_experts=64,
    experts_per_token=4,
    expert_dim=1024,
    num_dense_layers=1,
)

PRESETS = {"tiny": _TINY, "small": _SMALL, "345m": _345M, "0.5b": _HALF_B, "8b-a1b": _8B_A1B}


def preset(name: str, variant: str = "hsa-ultralong") -> ModelConfig:
    """Returns the config of a preset in one of its variants.

    Args:
        name: one of `PRESETS`.
        variant: one of `config.VARIANTS`; `swa` and `full` are the same model without a memory.

    Raises:
        InvalidArgument: either is not known.
    """
    if name not in PRESETS:
        raise InvalidArgument(f"preset {name!r} is not one of {', '.join(PRESETS)}")
    if variant not in VARIANTS:
        raise InvalidArgument(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    return replace(PRESETS[name], variant=variant)
