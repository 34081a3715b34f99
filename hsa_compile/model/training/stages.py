"""Which stage a step belongs to, what the step's rows look like, and how the model is set for it."""

import itertools
import random
from dataclasses import dataclass

from torch import nn

from hsa_compile.model.config import ModelConfig
from hsa_compile.model.layers.hs_attention import Retrieval
from hsa_compile.model.layers.window_attention import WindowAttention
from hsa_compile.model.training.config import RunConfig, Stage
from hsa_compile.model.transformer import HSATransformer

NUM_LENGTHS = 16  # the most lengths of rows that a stage has


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What one step takes; it follows from config and step alone.

    Attributes:
        step: the number of the step, from 0.
        stage: the number of its stage.
        length: how many tokens each row has.
        num_rows: how many rows all processes take together.
        in_batch_memory: whether each row also sees the chunks of the others that its process takes with it.
    """

    step: int
    stage: int
    length: int
    num_rows: int
    in_batch_memory: bool = False


def stage_at(run: RunConfig, step: int) -> int:
    """Returns the number of the stage that a step belongs to."""
    return next((number for number, end in enumerate(stage_ends(run)) if step < end), len(run.stages) - 1)


def stage_ends(run: RunConfig) -> list[int]:
    """Returns how many steps have been made when each stage is over."""
    shares = list(itertools.accumulate(stage.share for stage in run.stages))
    return [round(run.train.steps * share / shares[-1]) for share in shares]


def plan_step(run: RunConfig, step: int) -> StepPlan:
    """Plans the rows of a step; they are the same in every process and after every interruption."""
    number = stage_at(run, step)
    stage = run.stages[number]
    length = random.Random(f"length {run.train.seed} {step}").choice(lengths(stage))
    return StepPlan(
        step=step,
        stage=number,
        length=length,
        num_rows=max(1, stage.batch_tokens // length),
        in_batch_memory=stage.in_batch_memory,
    )


def lengths(stage: Stage) -> list[int]:
    """Returns how long the rows of a stage's steps may be: few values, from the shortest to the longest.

    A kernel is built and kept for each shape that comes up, so hundreds of them would cost time and gigabytes.
    """
    steps = min(NUM_LENGTHS - 1, stage.seq_len - stage.shortest)
    return [stage.shortest + (stage.seq_len - stage.shortest) * i // max(steps, 1) for i in range(steps + 1)]


def apply_stage(model: nn.Module, config: ModelConfig) -> None:
    """Sets window and top-k of all layers, and the model's noise, as the config has them; calls read them."""
    for module in model.modules():
        if isinstance(module, HSATransformer):
            module.config = config
        elif isinstance(module, WindowAttention):
            module.window = config.window
        elif isinstance(module, Retrieval):
            module.top_k = config.top_k
