"""The learning rate of each step, what decays, and what Muon moves."""

import pytest
import torch
from small_runs import small_run

from hsa_compile.model.training.config import TrainConfig
from hsa_compile.model.training.optimizer import make_optimizer
from hsa_compile.model.transformer import HSATransformer


def rates(**changes: object) -> list[float]:
    config = TrainConfig(steps=10, lr=1.0, warmup_steps=4, decay_share=0.4, final_lr=0.1, **changes)  # type: ignore[arg-type]
    return [config.learning_rate(step) for step in range(10)]


def test_warm_up_is_linear_and_then_it_stays() -> None:
    assert rates() == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_decay_falls_to_the_final_rate_at_the_last_step(decay: str) -> None:
    found = rates(decay=decay)
    assert found[:6] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert found[5:] == sorted(found[5:], reverse=True)
    assert found[-1] == pytest.approx(0.1)


def test_linear_and_cosine_differ_in_between() -> None:
    assert rates(decay="linear")[6] == pytest.approx(1 - 0.9 / 4)
    assert rates(decay="cosine")[6] > rates(decay="linear")[6]


def test_vectors_do_not_decay() -> None:
    run = small_run()
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    decayed, kept = make_optimizer(model, run.train).param_groups
    assert [weight.dim() for weight in decayed["params"]] == [2]
    assert [weight.dim() for weight in kept["params"]] == [1, 1, 1]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.01, 0)


@pytest.mark.parametrize("model", [{"tie_embeddings": False}, {"variant": "ramba"}, {"variant": "drt"}])
def test_muon_moves_the_matrices_of_hidden_layers(model: dict[str, object]) -> None:
    run = small_run(model=model, optimizer="muon")
    trained = HSATransformer(run.model)
    matrices, *others = make_optimizer(trained, run.train).param_groups
    by_muon = {id(weight) for weight in matrices["params"]}
    by_adamw = {id(weight) for group in others for weight in group["params"]}
    assert not by_muon & by_adamw
    assert by_muon | by_adamw == {id(weight) for weight in trained.parameters()}
    edges = ("embedding", "convolution", "output", "router")
    for name, weight in trained.named_parameters():
        is_edge = weight.dim() != 2 or any(f"{edge}." in name for edge in edges)
        assert (id(weight) in by_adamw) == is_edge, name


def test_a_step_of_muon_moves_rare_directions_as_far_as_frequent_ones() -> None:
    layer = torch.nn.Linear(12, 8)
    before = layer.weight.detach().clone()
    left, right = (torch.linalg.qr(torch.randn(size, 8)).Q for size in (8, 12))
    layer.weight.grad = left @ torch.diag(torch.logspace(0, -1.5, 8)) @ right.T
    run = small_run(optimizer="muon", weight_decay=0)
    make_optimizer(layer, run.train).step()
    moved = torch.linalg.svdvals(before - layer.weight.detach()) / (run.train.lr * 0.2 * 12**0.5)
    assert moved.min() > 0.5
    assert moved.max() < 1.5


def test_one_learning_rate_moves_all_weights() -> None:
    run = small_run(optimizer="muon")
    optimizer = make_optimizer(HSATransformer(run.model), run.train)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert all(torch.equal(one, two) for one, two in zip(before, weights, strict=True))
    optimizer.zero_grad()
    assert all(weight.grad is None for weight in weights)
