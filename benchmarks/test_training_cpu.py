"""A training step of `tiny` on a CPU against the same model with attention to everything, of equal size."""

import functools

import pytest
import torch

from hsa_compile.model.presets import preset
from hsa_compile.model.training.config_file import resolve
from hsa_compile.model.training.optimizer import make_optimizer
from hsa_compile.model.training.step import LossModel, autocast
from hsa_compile.model.transformer import HSATransformer

TOKENS = 8192  # of a step, whatever the length of its rows


class Trainer:
    """A variant of `tiny` with its optimizer, as its recipe has them."""

    def __init__(self, variant: str) -> None:
        torch.manual_seed(0)
        self.recipe = resolve(preset_name="tiny").train
        self.loss_model = LossModel(HSATransformer(preset("tiny", variant)).train(), self.recipe.loss_chunk)
        self.optimizer = make_optimizer(self.loss_model, self.recipe)

    def step(self, tokens: torch.Tensor) -> None:
        """One optimizer step."""
        with autocast(self.recipe.precision, tokens.device):
            loss, _ = self.loss_model(tokens, torch.full(tokens.shape, 1 / tokens.numel()), 0)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize(("length", "least"), [(1024, 0.8), (TOKENS, 3)], ids=["T1024", "T8192"])
@pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")
def test_training_step(length: int, least: float, race) -> None:
    tokens = torch.randint(256, (TOKENS // length, length), generator=torch.Generator().manual_seed(0))
    contenders = {
        variant: functools.partial(Trainer(variant).step, tokens) for variant in ("hsa-ultralong", "full", "swa")
    }
    race(contenders, 5, {"full": least})
