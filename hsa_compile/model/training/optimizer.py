"""AdamW and the learning rate of each step."""

import math

import torch
from torch import nn

from hsa_compile.model.training.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101); matrices decay, norms and biases do not."""
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in parameters if weight.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [weight for weight in parameters if weight.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Of the step, counted from 0: linear warm-up, then constant, then the decay of the last part."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    decay_steps = round(config.steps * config.decay_share)
    into = step - (config.steps - decay_steps) + 1
    if config.decay == "constant" or into <= 0:
        return config.lr
    progress = min(1.0, into / decay_steps)
    falling = 1 - progress if config.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.final_lr + (1 - config.final_lr) * falling)
