"""What a model will cost before it exists: parameters, memory and FLOPs, counted from its config alone."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.config import LayerSpec, ModelConfig
from hsa_compile.model.layer import Layer
from hsa_compile.model.layers.moe import MoE
from hsa_compile.model.transformer import HSATransformer, empty_model

TRAINING_OVER_FORWARD = 3  # the backward pass has two products for each of the forward pass
MAX_CONTEXT = 2**40


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInfo:
    """What one layer is made of, and how many parameters it has.

    Attributes:
        index: the layer's number, counted from the bottom.
        half: `lower` or `upper`.
        mixer, retrieves, reads_memory, mlp: as in `LayerSpec`.
        parameters: how many parameters it has.
        active_parameters: how many of them one token passes; experts that are not chosen are left out.
    """

    index: int
    half: str
    mixer: str
    retrieves: bool
    reads_memory: bool
    mlp: str
    parameters: int
    active_parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes that reading a text takes.

    Attributes:
        weights: the weights of the model.
        caches: what the mixers keep (windows, Mamba-2 states, all keys and values of `full`), the open chunk, and the
            newest embeddings.
        chunk_keys, chunk_values, landmarks: the three parts of the memory.
    """

    weights: int
    caches: int
    chunk_keys: int
    chunk_values: int
    landmarks: int

    @property
    def total(self) -> int:
        """All bytes together."""
        return self.weights + self.caches + self.chunk_keys + self.chunk_values + self.landmarks


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What `model_info` counts.

    Attributes:
        config: the config of the model.
        layers: from the bottom up.
        parameters: how many parameters there are, with tied embeddings counted once.
        embedding_parameters: those of the embedding, of its convolution, and of the output layer where it is not the
            embedding.
        encoder_parameters: those of the chunk encoder.
        active_parameters: those that one token passes, without embeddings.
        context: the length that memory and FLOPs are for, in tokens of text.
        memory: what reading takes at that length.
        flops: what a token of text costs in the forward pass, on average over the context, by part of the model.
        kernel_flops: the part of it that our own kernels do: scores of landmarks, attention to chunks.
    """

    config: ModelConfig
    layers: tuple[LayerInfo, ...]
    parameters: int
    embedding_parameters: int
    encoder_parameters: int
    active_parameters: int
    context: int
    memory: MemoryUse
    flops: dict[str, float]
    kernel_flops: dict[str, float]

    @property
    def forward_flops(self) -> float:
        """FLOPs of all parts for a token of text."""
        return sum(self.flops.values())

    @property
    def training_flops(self) -> float:
        """FLOPs of the forward and backward pass for a token of text."""
        return TRAINING_OVER_FORWARD * self.forward_flops

    @property
    def prefill_flops(self) -> float:
        """FLOPs for a token of a long prompt.

        It goes through the lower half and the chunk encoder alone, where the exact fast prefill can leave the upper
        half to the last tokens; in `ramba` and `full` it goes through everything but the output.
        """
        if self.config.variant in ("ramba", "full"):
            return self.forward_flops - self.flops["output"]
        return self.flops["lower layers"] + self.flops["chunk encoder"]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, ready for JSON."""
        values = asdict(self)
        values["memory"]["total"] = self.memory.total
        for name in ("forward_flops", "training_flops", "prefill_flops"):
            values[name] = getattr(self, name)
        return values


def model_info(config: ModelConfig, *, context: int = 8192, dtype: torch.dtype = torch.bfloat16) -> ModelInfo:
    """Counts a model on the meta device; no weight is allocated.

    Args:
        config: the config of the model.
        context: how many tokens of text it reads.
        dtype: the dtype of weights, caches and memory.

    Raises:
        InvalidArgument: context is out of range.
    """
    if not 1 <= context <= MAX_CONTEXT:
        raise InvalidArgument(f"context = {context} must be in 1 … {MAX_CONTEXT}")
    model = empty_model(config)
    flops, kernel_flops = _flops(model, context)
    layers = tuple(_layer_info(config, layer, spec) for layer, spec in _layers(model))
    parameters = _count(model)
    embedding = sum(_count(part) for part in (model.embedding, model.convolution, model.output) if part is not None)
    return ModelInfo(
        config=config,
        layers=layers,
        parameters=parameters,
        embedding_parameters=embedding,
        encoder_parameters=_count(model.chunk_encoder) if model.chunk_encoder is not None else 0,
        active_parameters=parameters - embedding - _idle(model),
        context=context,
        memory=_memory(config, context, parameters, dtype.itemsize),
        flops=flops,
        kernel_flops=kernel_flops,
    )


def training_flops(model: HSATransformer, context: int, other_chunks: int = 0) -> float:
    """Returns the FLOPs of training, forward and backward, for a token of text, as `ModelInfo.training_flops` does.

    Args:
        model: a model on any device; its config's window and top-k count, as a stage of training has set them.
        context: how many tokens a text has.
        other_chunks: how many chunks each token sees beside those of its own text.
    """
    return TRAINING_OVER_FORWARD * sum(_flops(model, context, other_chunks)[0].values())


def _layers(model: HSATransformer) -> Iterator[tuple[Layer, LayerSpec]]:
    for layer, spec in zip([*model.lower, *model.upper], model.config.layers, strict=True):
        assert isinstance(layer, Layer)
        yield layer, spec


def _layer_info(config: ModelConfig, layer: Layer, spec: LayerSpec) -> LayerInfo:
    return LayerInfo(
        index=layer.index,
        half="lower" if layer.index < config.num_lower_layers else "upper",
        **asdict(spec),
        parameters=_count(layer),
        active_parameters=_count(layer) - _idle(layer),
    )


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _idle(module: nn.Module) -> int:
    """Counts parameters of the experts that a token does not choose."""
    return sum(
        (moe.gate_up.numel() + moe.down.numel()) * (moe.num_experts - moe.experts_per_token) // moe.num_experts
        for moe in module.modules()
        if isinstance(moe, MoE)
    )


def num_positions(config: ModelConfig, context: int) -> int:
    """Counts the tokens of a text that run through the layers, with those that DRT puts in."""
    return context + (context // (config.chunk_size - 1) if config.has_landmark_tokens else 0)


def _memory(config: ModelConfig, context: int, parameters: int, itemsize: int) -> MemoryUse:
    positions = num_positions(config, context)
    pair = 2 * config.num_kv_heads * config.head_dim * itemsize
    inner = config.mamba_expand * config.dim
    mixers = {
        "window": (config.window - 1) * pair,
        "full": positions * pair,
        "mamba": 3 * (inner + 2 * config.state_dim) * itemsize + inner * config.state_dim * max(itemsize, 4),
        "none": 0,
    }
    num_chunks = positions // config.chunk_size if config.has_memory else 0
    keys = num_chunks * config.chunk_size * config.memory_kv_heads * config.memory_head_dim * itemsize
    return MemoryUse(
        weights=parameters * itemsize,
        caches=sum(mixers[spec.mixer] for spec in config.layers)
        + (config.chunk_size - 1 + config.embedding_window - 1) * config.dim * itemsize,
        chunk_keys=keys,
        chunk_values=keys,
        landmarks=num_chunks * config.landmarks_per_chunk * config.memory_kv_heads * config.retrieval_dim * itemsize,
    )


def _flops(
    model: HSATransformer, context: int, other_chunks: int = 0
) -> tuple[dict[str, float], dict[str, float]]:  # fmt: skip
    """Returns the FLOPs of all parts, and what our kernels do of them.

    Products count two FLOPs a multiplication; norms, RoPE, the convolution of embeddings, softmax and the choice of
    chunks are left out.
    """
    config = model.config
    T = num_positions(config, context)
    parts = dict.fromkeys(("lower layers", "chunk encoder", "retrieval", "chunk attention", "upper layers"), 0.0)
    kernels = dict.fromkeys(("retrieval", "chunk attention"), 0.0)
    if model.chunk_encoder is not None:
        parts["chunk encoder"] = _encoder_flops(model)
    # DRT retrieves once a chunk, and a chunk does not see the one right before it.
    skipped, queries = (1, 1 / config.chunk_size) if config.has_landmark_tokens else (0, 1.0)
    seen = max(0, T - skipped * config.chunk_size)
    visible = other_chunks + _sum_of_chunks(seen, config.chunk_size, seen) / T
    others_read = min(other_chunks, config.top_k)
    read = others_read + _sum_of_chunks(seen, config.chunk_size, config.top_k - others_read) / T
    keys = read * (config.chunk_size - config.has_landmark_tokens)
    for layer, spec in _layers(model):
        half = "lower layers" if layer.index < config.num_lower_layers else "upper layers"
        parts[half] += sum(2 * _multiplied(part) for part in (layer.mixer, layer.mlp) if part is not None)
        parts[half] += _mixing_flops(config, spec.mixer, T)
        if layer.retrieval is not None:
            parts["retrieval"] += 2 * queries * _multiplied(layer.retrieval)
            of_a_chunk = config.landmarks_per_chunk * config.memory_kv_heads * config.retrieval_dim
            kernels["retrieval"] += 2 * queries * of_a_chunk * visible
        if layer.memory_attention is not None:
            parts["chunk attention"] += 2 * _multiplied(layer.memory_attention)
            kernels["chunk attention"] += 4 * config.memory_heads * config.memory_head_dim * keys
    kernels = {name: flops * T / context for name, flops in kernels.items()}
    parts = {name: flops * T / context + kernels.get(name, 0.0) for name, flops in parts.items()}
    return parts | {"output": 2.0 * config.dim * config.vocab_size}, kernels


def _encoder_flops(model: HSATransformer) -> float:
    """Returns a token's share of its chunk."""
    encoder, config = model.chunk_encoder, model.config
    assert encoder is not None
    length = config.chunk_size + (encoder.cls is not None)
    attention = 2 * config.encoder_layers * config.num_heads * config.head_dim * length**2
    of_tokens = (encoder.k_proj, encoder.v_proj, encoder.token_proj)
    tokens = sum(_multiplied(part) for part in of_tokens if part is not None)
    products = length * _multiplied(encoder.layers) + config.chunk_size * tokens + _multiplied(encoder.landmark_proj)
    return 2 * (products + attention) / config.chunk_size


def _multiplied(module: nn.Module) -> int:
    """Counts the weights that one token is multiplied with."""
    return sum(weight.numel() for weight in module.parameters() if weight.dim() > 1) - _idle(module)


def _mixing_flops(config: ModelConfig, mixer: str, T: int) -> float:
    """Returns what a mixer does for a token beyond its projections, on average over T of them."""
    inner = config.mamba_expand * config.dim
    widths = {"window": min(config.window, T), "full": T}
    if mixer in widths:
        width = widths[mixer]
        keys = (width * (width + 1) / 2 + (T - width) * width) / T
        return 4 * config.num_heads * config.head_dim * keys
    # This is the recurrence: decay, update and output of each number of the state.
    return 5.0 * inner * config.state_dim if mixer == "mamba" else 0.0


def _sum_of_chunks(T: int, chunk_size: int, most: int) -> int:
    """Returns `Σ min(⌊t / C⌋, most)` over t = 0 … T − 1: chunks that are complete at a token, at most so many."""
    n = min(T // chunk_size, most)
    return chunk_size * n * (n - 1) // 2 + (T - n * chunk_size) * n
