"""The batches of a run, made ahead in a thread of their own: each a function of (seed, step, rank)."""

import itertools
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hsa_compile.model.data.training_sample import TrainingSample
from hsa_compile.model.tasks.mixture import Mixture, training_sample
from hsa_compile.model.training.config import MAX_ROWS, RunConfig
from hsa_compile.model.training.stages import StepPlan, plan_step

AHEAD = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepBatch:
    """A process's rows of one step, on the CPU.

    Attributes:
        plan: what the step takes.
        tokens: `[B, T]` int64.
        weights: `[B, T]` float32, of each token's prediction, answers and text alike; 0 for the first.
        is_answer: `[B, T]` bool.
    """

    plan: StepPlan
    tokens: Tensor
    weights: Tensor
    is_answer: Tensor


def make_batch(
    mixture: Mixture, plan: StepPlan, *, seed: int, rank: int = 0, world_size: int = 1
) -> StepBatch:  # fmt: skip
    """The rows of one process: together the processes take those that one alone would take."""
    rows = range(plan.num_rows * rank // world_size, plan.num_rows * (rank + 1) // world_size)
    samples = [training_sample(mixture, plan.length, seed, plan.step * MAX_ROWS + row) for row in rows]
    return stack_samples(plan, samples)


def stack_samples(plan: StepPlan, samples: list[TrainingSample]) -> StepBatch:
    """Rows of equal length as tensors."""
    is_answer = np.zeros((len(samples), plan.length), bool)
    for row, sample in enumerate(samples):
        for start, end in sample.answer_spans:
            is_answer[row, start:end] = True
    tokens = np.empty(is_answer.shape, np.int64)
    weights = np.empty(is_answer.shape, np.float32)
    for row, sample in enumerate(samples):
        tokens[row], weights[row] = sample.tokens, sample.loss_weights
    return StepBatch(
        plan=plan,
        tokens=torch.from_numpy(tokens),
        weights=torch.from_numpy(weights),
        is_answer=torch.from_numpy(is_answer),
    )


class Feed:
    """The batches from a step on, in order, a few of them made ahead.

    Args:
        run: of the run.
        by_stage: what each stage draws from.
        first_step: of the first batch.
        rank, world_size: of this process.
    """

    def __init__(
        self, run: RunConfig, by_stage: tuple[Mixture, ...], *, first_step: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self._run, self._by_stage, self._rank, self._world_size = run, by_stage, rank, world_size
        self._steps = itertools.count(first_step)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._coming: deque[Future[StepBatch]] = deque()
        for _ in range(AHEAD):
            self._order()

    def next(self) -> StepBatch:
        """The next batch; what went wrong while it was made is raised here."""
        self._order()
        return self._coming.popleft().result()

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _order(self) -> None:
        self._coming.append(self._thread.submit(self._batch, next(self._steps)))

    def _batch(self, step: int) -> StepBatch:
        plan = plan_step(self._run, step)
        return make_batch(
            self._by_stage[plan.stage], plan, seed=self._run.train.seed, rank=self._rank, world_size=self._world_size
        )
