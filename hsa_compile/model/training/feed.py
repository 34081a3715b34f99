"""The batches of a run, made ahead in a thread of their own: each a function of (seed, step, rank)."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hsa_compile.model.data.batches import TrainingSample
from hsa_compile.model.data.corpus import TokenCorpus
from hsa_compile.model.data.manifest import TRAIN
from hsa_compile.model.data.prepare import prepare
from hsa_compile.model.data.sources import stdlib_sources
from hsa_compile.model.tasks.haystack import NOISE, STDLIB, Haystack, NoiseHaystack, corpus_haystack
from hsa_compile.model.tasks.mixture import Mixture, training_sample
from hsa_compile.model.training.config import MAX_ROWS, RunConfig
from hsa_compile.model.training.stages import StepPlan, plan_step
from hsa_compile.paths import cache_dir

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


def open_corpus(run: RunConfig, split: str = TRAIN) -> TokenCorpus | None:
    """The corpus of a run, or None if it has none; that of the standard library is prepared where it is not there.

    Raises:
        CorpusError: it is incomplete or damaged, or cannot be written.
    """
    if not run.data.corpus:
        return None
    if run.data.corpus != STDLIB:
        return TokenCorpus(Path(run.data.corpus).expanduser(), split=split)
    directory = cache_dir() / "corpora" / STDLIB
    prepare(stdlib_sources(), directory)
    return TokenCorpus(directory, split=split)


def mixtures(run: RunConfig, corpus: TokenCorpus | None) -> tuple[Mixture, ...]:
    """What each stage draws its rows from.

    Raises:
        InvalidArgument: a stage's numbers do not fit together.
    """
    return tuple(
        Mixture(
            haystacks=tuple((_haystack(name, corpus), weight) for name, weight in stage.haystacks.items()),
            corpus=corpus,
            synthetic_share=stage.synthetic_share,
            chain_share=stage.chain_share,
            num_needles=stage.num_needles,
            num_queries=stage.num_queries,
            min_distance=run.model_in(stage).window if stage.min_distance is None else stage.min_distance,
            min_episode=stage.min_episode,
            text_weight=run.data.text_weight,
            answer_weight=run.data.answer_weight,
            corpus_weight=run.data.corpus_weight,
        )
        for stage in run.stages
    )


def _haystack(name: str, corpus: TokenCorpus | None) -> Haystack:
    if name == NOISE:
        return NoiseHaystack()
    assert corpus is not None  # checked by RunConfig
    return corpus_haystack(corpus)


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
    """The batches from a step on, in order, a few of them ready before they are asked for.

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
        self._ready: queue.Queue[StepBatch | Exception] = queue.Queue(maxsize=AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(first_step,), name="batches", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[StepBatch]:
        for _ in range(self._run.train.steps):
            yield self.next()

    def next(self) -> StepBatch:
        """The next batch; what went wrong while it was made is raised here."""
        item = self._ready.get()
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)  # makes room for a batch that waits
            except queue.Empty:
                continue

    def _fill(self, step: int) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(self._batch(step))
            except Exception as error:  # noqa: BLE001 it is raised where the batch is asked for
                self._ready.put(error)
                return
            step += 1

    def _batch(self, step: int) -> StepBatch:
        plan = plan_step(self._run, step)
        return make_batch(
            self._by_stage[plan.stage], plan, seed=self._run.train.seed, rank=self._rank, world_size=self._world_size
        )
