"""The balancing of experts at work in the model that it is for."""

import argparse
from pathlib import Path

import pytest
import torch

from hsa_compile.model.layers.moe import MoE
from hsa_compile.model.training.config_file import resolve
from hsa_compile.model.training.optimizer import make_optimizer, update_routers
from hsa_compile.model.transformer import HSATransformer


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")
def test_tiny_is_balanced_after_300_steps_from_an_unbalanced_start() -> None:
    torch.manual_seed(0)
    recipe = resolve(preset_name="tiny", overrides=["train.lr=1e-3"])
    model = HSATransformer(recipe.model).train()
    moes = [module for module in model.modules() if isinstance(module, MoE)]
    for moe in moes:
        moe.balance_bias[:2] += 0.25  # two of eight are everyone's choice
    optimizer = make_optimizer(model, recipe.train)
    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long()
    loads: list[list[float]] = []
    for _ in range(300):
        starts = torch.randint(len(text) - 257, (4, 1))
        tokens = text[starts + torch.arange(257)]
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loads.append([moe.max_over_mean_load for moe in moes])
        update_routers(moes, recipe.train)
    assert min(loads[0]) > 3
    last = torch.tensor(loads[-20:])
    assert last.mean(0).max() <= 1.5
