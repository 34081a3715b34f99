"""The steps that can be profiled: one of training, one reading of a text, one decoded token."""

from collections.abc import Callable

import torch

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.choices import PREFILL, STEPS, TRAIN
from hsa_compile.model.generate import evaluating
from hsa_compile.model.inference import extend, new_state, prefill
from hsa_compile.model.training.config import TrainConfig
from hsa_compile.model.training.feed import StepBatch
from hsa_compile.model.training.optimizer import make_optimizer
from hsa_compile.model.training.processes import Processes
from hsa_compile.model.training.stages import StepPlan
from hsa_compile.model.training.step import LossModel, run_step
from hsa_compile.model.transformer import HSATransformer

Step = Callable[[], object]


def make_step(kind: str, model: HSATransformer, *, batch: int, seq_len: int) -> Step:
    """A step over random tokens that can be called again and again.

    Args:
        kind: `train`, one optimizer step over `batch` rows of `seq_len` tokens; `prefill`, reading them from the first
            token on; `decode`, one token for each row after so many were read.
        model: on its device; `train` moves its weights.
        batch, seq_len: at least 1; 2 tokens for `train`.

    Raises:
        InvalidArgument: a value is not allowed.
    """
    least = 2 if kind == TRAIN else 1
    if kind not in STEPS or batch < 1 or seq_len < least:
        raise InvalidArgument(
            f"step {kind!r} with batch = {batch}, seq_len = {seq_len}; allowed are {', '.join(STEPS)}, a batch of at "
            f"least 1 and at least {least} tokens"
        )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (batch, seq_len), generator=generator)
    if kind == TRAIN:
        return _train(model, tokens)
    tokens = tokens.to(model.device)
    return _prefill(model, tokens) if kind == PREFILL else _decode(model, tokens)


def _train(model: HSATransformer, tokens: torch.Tensor) -> Step:
    config = TrainConfig(steps=1_000, lr=1e-5, warmup_steps=0)
    loss_model = LossModel(model.train(), config.loss_chunk)
    optimizer, processes = make_optimizer(model, config), Processes(device=model.device)
    weights = torch.ones(tokens.shape).index_fill(1, torch.tensor([0]), 0)
    rows = StepBatch(
        plan=StepPlan(step=0, stage=0, length=tokens.shape[1], num_rows=tokens.shape[0]),
        tokens=tokens,
        weights=weights,
        is_answer=torch.zeros(tokens.shape, dtype=torch.bool),
    )
    return lambda: run_step(loss_model, optimizer, rows, config, processes)


def _prefill(model: HSATransformer, tokens: torch.Tensor) -> Step:
    model.eval()
    return lambda: prefill(model, tokens, new_state(model, tokens.shape[0]))


def _decode(model: HSATransformer, tokens: torch.Tensor) -> Step:
    with evaluating(model):
        state = new_state(model, tokens.shape[0])
        prefill(model, tokens, state)
    model.eval()
    return lambda: extend(model, tokens[:, -1:], state)
