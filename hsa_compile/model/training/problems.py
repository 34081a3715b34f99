"""What a run will ask of the schedule cache, over all its stages and lengths."""

from collections import Counter

import torch

from hsa_compile.model.training.config import RunConfig, Stage
from hsa_compile.model.training.step import autocast
from hsa_compile.model.workload import problems
from hsa_compile.problem import Problem

RARE = 0.05  # of a stage's lengths: what fewer ask for is left to the nearest tuned shape


def run_problems(run: RunConfig, device: torch.device, world_size: int = 1) -> list[Problem]:
    """One problem for each key of the cache that the steps of a run ask for, but for rare ones.

    Args:
        run: of the run.
        device: that it computes on, which decides the dtype.
        world_size: processes that share a step's rows.
    """
    with autocast(run.train.precision, device):
        on_autocast = torch.is_autocast_enabled(device.type)
    dtype = "bfloat16" if on_autocast else "float32"
    found: dict[Problem, Problem] = {}
    for stage in run.stages:
        found = {**_stage_problems(run, stage, dtype, world_size), **found}
    return list(found.values())


def _stage_problems(run: RunConfig, stage: Stage, dtype: str, world_size: int) -> dict[Problem, Problem]:
    """By key; of the shapes that share one, the longest stands for all."""
    config = run.model_in(stage)
    lengths = range(stage.shortest, stage.seq_len + 1)
    counts: Counter[Problem] = Counter()
    longest: dict[Problem, Problem] = {}
    for length in lengths:
        rows = max(1, stage.batch_tokens // length // world_size // run.train.accumulation)
        for problem in problems(config, rows, length - 1, dtype):
            counts[problem.bucketed()] += 1
            longest[problem.bucketed()] = problem
    return {key: longest[key] for key, count in counts.items() if count >= RARE * len(lengths)}
