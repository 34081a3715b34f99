"""The learning rate of each step, and what decays."""

import pytest
import torch
from small_runs import small_run

from hsa_compile.model.training.config import TrainConfig
from hsa_compile.model.training.step import make_optimizer


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
