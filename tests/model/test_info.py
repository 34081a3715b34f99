"""Counts from the config alone agree with published ones, with built models and with what really runs."""

import subprocess
import sys

import pytest
import torch
from small_models import build, combinations, small_config
from torch.utils.flop_counter import FlopCounterMode

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.config import VARIANTS
from hsa_compile.model.cost.info import model_info
from hsa_compile.model.inference.inference import extend, new_state
from hsa_compile.model.presets import PRESETS, preset
from hsa_compile.model.transformer import empty_model

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")


@pytest.mark.parametrize(("variant", "parameters"), [("hsa-ultralong", 537_720_384), ("full", 519_622_656)])
def test_the_dense_model_has_as_many_parameters_as_published(variant: str, parameters: int) -> None:
    assert model_info(preset("0.5b", variant)).parameters == parameters


@pytest.mark.parametrize(
    ("name", "variant", "total", "active"),
    [
        ("8b-a1b", "swa", 8.01e9, 0.84e9),
        ("8b-a1b", "hsa-ultralong", 8.08e9, 0.91e9),
        ("tiny", "hsa-ultralong", 1.89e6, 1.01e6),
        ("small", "hsa-ultralong", 29.8e6, 14.3e6),
    ],
)
def test_presets_are_as_large_as_their_names_say(name: str, variant: str, total: float, active: float) -> None:
    info = model_info(preset(name, variant))
    assert info.parameters - info.embedding_parameters == pytest.approx(total, rel=0.005)
    assert info.active_parameters == pytest.approx(active, rel=0.005)


def test_the_345m_has_345_million() -> None:
    assert model_info(preset("345m")).parameters == pytest.approx(345e6, rel=0.01)


@pytest.mark.parametrize(("name", "variant"), combinations(list(PRESETS), VARIANTS))
def test_layers_and_encoder_add_up(name: str, variant: str) -> None:
    config = preset(name, variant)
    info = model_info(config)
    rest = config.dim * (1 + config.has_landmark_tokens)  # the last norm, DRT's token
    layers = sum(layer.parameters for layer in info.layers)
    assert info.parameters == info.embedding_parameters + layers + info.encoder_parameters + rest
    active = sum(layer.active_parameters for layer in info.layers)
    assert info.active_parameters == active + info.encoder_parameters + rest
    assert [layer.index for layer in info.layers] == list(range(config.num_layers))


def test_counts_are_those_of_the_built_model(variant: str) -> None:
    model = build(small_config(variant))
    assert model_info(model.config).parameters == sum(weight.numel() for weight in model.parameters())


@pytest.mark.slow
def test_the_largest_preset_is_counted_in_little_memory() -> None:
    script = """
from pathlib import Path
from hsa_compile.model.cost.info import model_info
from hsa_compile.model.presets import preset
def peak_kib():  # of this program alone: ru_maxrss would be at least that of the process that started it
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])
before = peak_kib()
assert model_info(preset("8b-a1b"), context=2**24).parameters > 8e9
print(peak_kib(), peak_kib() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    peak, grown = (int(word) / 1024 for word in done.stdout.split())
    assert peak < 1024
    assert grown < 300


@pytest.mark.parametrize(("variant", "length"), combinations(VARIANTS, [31]) + combinations(VARIANTS[:1], [4]))
def test_the_memory_that_reading_takes_is_what_was_said(variant: str, length: int) -> None:
    model = build(small_config(variant))
    state = new_state(model)
    for tokens in torch.zeros(1, length, dtype=torch.int64).split(1, dim=1):
        extend(model, tokens, state)
    said = model_info(model.config, context=length, dtype=torch.float32).memory
    assert said.weights == 4 * sum(weight.numel() for weight in model.parameters())
    caches = [tensor for cache in [*state.lower, *state.upper] if cache is not None for tensor in _tensors(cache)]
    assert said.caches == sum(tensor.nbytes for tensor in [*caches, state.newest, state.pending])
    if state.memory is not None:
        config, chunks = model.config, state.memory.num_chunks[0]
        assert said.chunk_keys == chunks * config.chunk_size * config.memory_kv_heads * config.memory_head_dim * 4
        assert said.chunk_values == said.chunk_keys
        landmarks = chunks * config.landmarks_per_chunk
        assert said.landmarks == landmarks * config.memory_kv_heads * config.retrieval_dim * 4
    else:
        assert said.chunk_keys + said.chunk_values + said.landmarks == 0


def _tensors(cache: object) -> list[torch.Tensor]:
    return [getattr(cache, name) for name in cache.__slots__]


@pytest.mark.parametrize("variant", ["full", "swa", "hsa-ultralong"])
def test_flops_are_those_that_pytorch_counts(variant: str) -> None:
    """On a length that is one block of the windows, which PyTorch counts as full squares."""
    length, config = 20, small_config(variant, chunk_size=4)
    with FlopCounterMode(display=False) as counter:
        empty_model(config)(torch.zeros(1, length, dtype=torch.int64, device="meta"))
    counted = counter.get_total_flops()
    info = model_info(config, context=length)
    dot = 4 * config.num_heads * config.head_dim * config.num_layers
    pairs = {
        "full": (length + 1) / 2,
        "swa": (config.window * (config.window + 1) / 2 + (length - config.window) * config.window) / length,
    }
    pairs["hsa-ultralong"] = pairs["swa"]
    square = length if variant == "full" else length + config.window - 1
    weighting = sum(layer.mlp == "moe" for layer in info.layers) * 2 * config.experts_per_token * config.dim
    said = info.forward_flops + dot * (square - pairs[variant]) + weighting
    if variant == "hsa-ultralong":  # PyTorch does not know our own operators
        scores = 2 * config.landmarks_per_chunk * config.memory_kv_heads * config.retrieval_dim * 2
        read = 4 * config.memory_heads * config.memory_head_dim * 1.8 * config.chunk_size
        said -= config.num_groups * (scores + read)
    assert counted / length == pytest.approx(said, rel=1e-6)


def test_flops_of_a_long_context_grow_by_scores_alone() -> None:
    config = preset("tiny")
    near, far = (model_info(config, context=context).flops for context in (2**16, 2**20))
    for part in ("chunk encoder", "output"):
        assert near[part] == far[part]
    assert far["lower layers"] == pytest.approx(near["lower layers"], rel=1e-3)
    assert far["retrieval"] > 10 * near["retrieval"]


def test_a_context_out_of_range_is_refused() -> None:
    for context in (0, 2**41):
        with pytest.raises(InvalidArgument, match=rf"context = {context}"):
            model_info(preset("tiny"), context=context)


def test_every_variant_is_counted() -> None:
    for variant in VARIANTS:
        info = model_info(preset("tiny", variant), context=7)
        assert info.training_flops == 3 * info.forward_flops > 0
        assert 0 < info.prefill_flops < info.forward_flops
        assert info.to_dict()["memory"]["total"] == info.memory.total
