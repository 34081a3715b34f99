"""What a run will ask of the schedule cache, over all its stages and lengths."""

import torch

from hsa_compile.model.training.config import RunConfig, Stage
from hsa_compile.model.training.stages import lengths
from hsa_compile.model.training.step import chosen_precision
from hsa_compile.model.workload import problems
from hsa_compile.problem import Problem


def run_problems(run: RunConfig, device: torch.device, world_size: int = 1) -> list[Problem]:
    """One problem for each key of the cache that the steps of a run ask for.

    Args:
        run: of the run.
        device: that it computes on, which decides the dtype.
        world_size: processes that share a step's rows.
    """
    # On a CPU the kernels are for float32: `precision.without_cpu_autocast`.
    dtype = "float32" if device.type == "cpu" else chosen_precision(run.train.precision, device)
    found: dict[Problem, Problem] = {}
    for stage in run.stages:
        found = {**_stage_problems(run, stage, dtype, world_size), **found}
    return list(found.values())


def _stage_problems(run: RunConfig, stage: Stage, dtype: str, world_size: int) -> dict[Problem, Problem]:
    """By key; of the shapes that share one, the longest stands for all."""
    config = run.model_in(stage)
    longest: dict[Problem, Problem] = {}
    for length in lengths(stage):
        rows = max(1, stage.batch_tokens // length // world_size // run.train.accumulation)
        asked = problems(config, rows, length - 1, dtype, in_batch_memory=stage.in_batch_memory)
        longest |= {problem.bucketed(): problem for problem in asked}
    return longest
