"""The model as a whole: causality, gradients against reference ops in float64, published parameter counts."""

from dataclasses import replace

import pytest
import torch
from small_models import build, combinations, small_config

from hsa_compile.kernels.hsa_attention.reference import hsa_attention_reference
from hsa_compile.kernels.select_chunks.reference import select_chunks_reference
from hsa_compile.model.config import VARIANTS, ModelConfig
from hsa_compile.model.layers import hs_attention
from hsa_compile.model.presets import preset
from hsa_compile.model.transformer import HSATransformer

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")


@pytest.mark.parametrize(("variant", "place"), combinations(VARIANTS, [5, 4, 23, 0, 36]))
def test_a_changed_token_changes_no_logit_before_it(variant: str, place: int) -> None:
    model = build(small_config(variant))
    tokens = torch.randint(19, (2, 37))
    other = tokens.clone()
    other[:, place] = (other[:, place] + 1) % 19
    with torch.no_grad():
        logits, changed = model(tokens), model(other)
    torch.testing.assert_close(logits[:, :place], changed[:, :place], rtol=0, atol=1e-5)
    assert not torch.allclose(logits[:, place:], changed[:, place:])


def test_the_whole_past_is_reached(variant: str) -> None:
    """Through the memory, a window of 7 sees the first token of 60; a chunk of 5, top-k of all."""
    model = build(small_config(variant, top_k=16))
    tokens = torch.randint(19, (1, 60))
    other = tokens.clone()
    other[:, 0] = (other[:, 0] + 1) % 19
    with torch.no_grad():
        difference = (model(tokens) - model(other))[0, -1].abs().max()
    if variant == "swa":
        assert difference == 0
    else:
        assert difference > 1e-6


def test_embeddings_are_made_of_those_of_a_window_of_tokens() -> None:
    model = build(small_config("hsa-ultralong", embedding_window=4))
    x, before = torch.randn(2, 9, 24), torch.randn(2, 3, 24)
    mixed = model.with_tokens_before(x, before)
    rows = torch.cat((before, x), dim=1)
    weights = [torch.ones(24), *model.convolution.weight]
    for place in range(9):
        expected = sum(weight * rows[:, 3 + place - back] for back, weight in enumerate(weights))
        torch.testing.assert_close(mixed[:, place], expected)
    alone = model.with_tokens_before(x)
    torch.testing.assert_close(alone, model.with_tokens_before(x, torch.zeros(2, 3, 24)))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_pooling_adds_the_maximum_over_a_part_of_the_tokens_to_each_landmark(parts: int, norm: bool) -> None:
    config = small_config("hsa-ultralong", retrieval_norm=norm, pooled_landmarks=parts)
    pooled = build(config, torch.float64).chunk_encoder
    plain = build(replace(config, pooled_landmarks=0), torch.float64).chunk_encoder
    assert pooled is not None
    assert pooled.token_proj is not None
    assert plain is not None
    plain.load_state_dict({name: x for name, x in pooled.state_dict().items() if not name.startswith("token_proj")})
    outputs: list[torch.Tensor] = []
    plain.norm.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    chunks = torch.randn(2, 3, config.chunk_size, config.dim, dtype=torch.float64)
    encoded, landmarks = plain(chunks), pooled(chunks).landmarks
    cls, tokens = plain.landmark_proj(outputs[0][:, -1]), outputs[0][:, :-1]
    assert landmarks.shape == (2, 3, parts, config.memory_kv_heads, config.retrieval_dim)
    for number, row in enumerate(landmarks.flatten(0, 2)):
        chunk, part = divmod(number, parts)
        own = tokens[chunk].chunk(parts)[part]
        of_tokens = torch.stack([pooled.token_proj.weight @ token for token in own])
        expected = (cls[chunk] + of_tokens.max(dim=0).values).view_as(row)
        torch.testing.assert_close(row, pooled.landmark_norm(expected))
    torch.testing.assert_close(encoded.k, pooled(chunks).k)
    torch.nn.init.zeros_(pooled.token_proj.weight)  # as before training
    torch.testing.assert_close(pooled(chunks).landmarks, encoded.landmarks.expand_as(landmarks))


def test_a_config_from_before_the_window_of_embeddings_has_one_of_a_token() -> None:
    values = {name: value for name, value in small_config("swa").to_dict().items() if name != "embedding_window"}
    model = build(ModelConfig.from_dict(values))
    assert not [name for name, _ in model.named_parameters() if "convolution" in name]
    x = torch.randn(1, 5, 24)
    assert model.with_tokens_before(x) is x


def test_gradients_are_those_of_reference_ops_in_float64(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(variant, num_experts=0)
    model, exact = build(config), build(config, torch.float64)
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    tokens = torch.randint(19, (2, 43))
    weights = torch.randn(2, 43, 19)
    (model(tokens) * weights).sum().backward()
    monkeypatch.setattr(hs_attention, "hsa_attention", hsa_attention_reference)
    monkeypatch.setattr(hs_attention, "select_chunks", select_chunks_reference)
    (exact(tokens) * weights.double()).sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert mine.grad is not None, name
        assert theirs.grad is not None, name
        scale = theirs.grad.abs().max()
        assert scale > 0, name
        assert (mine.grad - theirs.grad).abs().max() <= 2e-4 * scale, name


def test_checkpointing_changes_no_gradient(variant: str) -> None:
    config = small_config(variant)
    tokens = torch.randint(19, (2, 43))
    gradients = []
    for checkpointed in (False, True):
        model = build(config).train()
        model.checkpoint_activations = checkpointed
        model(tokens, noise_seed=5).logsumexp(-1).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_training_draws_noise_and_evaluation_none() -> None:
    model = build(small_config("hsa-ultralong"))
    tokens = torch.randint(19, (1, 60))
    with torch.no_grad():
        assert torch.equal(model(tokens), model(tokens))
        model.train()
        torch.manual_seed(3)
        one, other = model(tokens), model(tokens)
        torch.manual_seed(3)
        again = model(tokens)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("variant", "count"), [("full", 519_622_656), ("hsa-ultralong", 537_720_384)])
def test_parameters_are_as_many_as_published(variant: str, count: int) -> None:
    with torch.device("meta"):
        model = HSATransformer(preset("0.5b", variant))
    assert sum(p.numel() for p in model.parameters()) == count


def test_half_precision_runs_forward_and_backward(variant: str) -> None:
    model = build(small_config(variant), torch.bfloat16)
    loss = model(torch.randint(19, (2, 23))).float().logsumexp(-1).mean()
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(("variant", "length"), combinations(VARIANTS, [5, 4, 9, 1]))
def test_short_texts_train(variant: str, length: int) -> None:
    model = build(small_config(variant)).train()
    model(torch.randint(19, (2, length))).logsumexp(-1).mean().backward()
    assert torch.isfinite(model.embedding.weight.grad).all()


def test_retrieval_scale_makes_the_weights_of_chunks_sharper_and_keeps_their_order() -> None:
    found = {}
    for scale in (1.0, 3.0):
        model = build(small_config("hsa-ultralong", retrieval_scale=scale), torch.float64)
        chosen: list[hs_attention.Selection] = []
        torch.manual_seed(0)
        with torch.no_grad():
            model(torch.randint(19, (1, 60)), selections=chosen)
        found[scale] = chosen[0]
    assert torch.equal(found[1.0].indices, found[3.0].indices)
    full = (found[1.0].indices >= 0).all(-1)
    sharper = found[1.0].weights[full].pow(3)
    torch.testing.assert_close(found[3.0].weights[full], sharper / sharper.sum(-1, keepdim=True))
