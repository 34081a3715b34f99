"""The batches of a run: what each stage draws from, and a thread that makes batches ahead, by seed, step and rank."""

import itertools
import random
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hsa_compile.errors import HSACompileWarning, InvalidArgument, warn_user
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.data.corpus import DocumentOrder, TokenCorpus, TrainingSample
from hsa_compile.model.data.manifest import TRAIN, VALIDATION
from hsa_compile.model.data.prepare import stdlib_corpus
from hsa_compile.model.layers.hs_attention import Retrieval
from hsa_compile.model.layers.window_attention import WindowAttention
from hsa_compile.model.tasks.facts import END, copied_values
from hsa_compile.model.tasks.haystack import (
    MADE,
    NOISE,
    STDLIB,
    Haystack,
    assignment_haystack,
    corpus_haystack,
)
from hsa_compile.model.tasks.mixture import Mixture, training_sample
from hsa_compile.model.training.config import (
    ASSIGNMENT_HAYSTACK,
    DOCUMENTS,
    MADE_HAYSTACKS,
    MAX_ROWS,
    RunConfig,
    Stage,
)
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
        num_rows=_num_rows(stage, length),
        in_batch_memory=stage.in_batch_memory,
    )


def tokens_before(run: RunConfig, step: int) -> int:
    """Returns how many tokens the steps before this one take, all processes together."""
    total = begin = 0
    for stage, end in zip(run.stages, stage_ends(run), strict=True):
        steps = range(begin, max(begin, min(step, end)))
        if stage.shortest == stage.seq_len:
            total += len(steps) * _num_rows(stage, stage.seq_len) * stage.seq_len
        else:
            total += sum(plan.num_rows * plan.length for plan in (plan_step(run, each) for each in steps))
        begin = end
    return total


def _num_rows(stage: Stage, length: int) -> int:
    return max(1, stage.batch_tokens // length)


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


def parts_of(model: nn.Module, names: Iterable[str]) -> list[nn.Parameter]:
    """Returns the weights of a model's parts, as far as it has them."""
    parts = (getattr(model, name) for name in names)
    return [weight for part in parts if part is not None for weight in part.parameters()]


AHEAD = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepBatch:
    """One process's rows of one step, on the CPU.

    Attributes:
        plan: the plan of the step.
        tokens: `[B, T]` int64.
        weights: `[B, T]` float32, what each token's prediction counts, in answers and text alike; 0 for the first.
        is_answer: `[B, T]` bool, answers and the full stops that end them.
        sources: `[B, T]` int64, where in its row the byte stands that an answer's byte is copied from; −1 for none.
            None if nothing is.
    """

    plan: StepPlan
    tokens: Tensor
    weights: Tensor
    is_answer: Tensor
    sources: Tensor | None = None


def make_batch(
    mixture: Mixture, plan: StepPlan, *, seed: int, rank: int = 0, world_size: int = 1, first_token: int = 0
) -> StepBatch:
    """Makes the rows of one process; together the processes take those that one alone would take.

    Args:
        mixture: what the rows are drawn from.
        plan: the plan of the step.
        seed: the seed of the run.
        rank, world_size: the number of this process, and how many there are.
        first_token: how many tokens the steps before take.
    """
    rows = range(plan.num_rows * rank // world_size, plan.num_rows * (rank + 1) // world_size)
    samples = [
        training_sample(mixture, plan.length, seed, plan.step * MAX_ROWS + row, first_token + row * plan.length)
        for row in rows
    ]
    return stack_samples(plan, samples)


def keep_own(batch: StepBatch, own: slice) -> StepBatch:
    """Counts only the predictions of the places `own`, which this process makes, where several share the rows."""
    weights = torch.zeros_like(batch.weights)
    weights[:, 1:][:, own] = batch.weights[:, 1:][:, own]
    return replace(batch, weights=weights)


def stack_samples(plan: StepPlan, samples: list[TrainingSample]) -> StepBatch:
    """Turns rows of equal length into tensors."""
    is_answer = np.zeros((len(samples), plan.length), bool)
    sources = np.full(is_answer.shape, -1, np.int64)
    for row, sample in enumerate(samples):
        for start, end in sample.answer_spans:
            is_answer[row, start : end + len(END)] = True
        for place, source, size in copied_values(sample.tokens.tobytes(), sample.answer_spans):
            sources[row, place : place + size] = range(source, source + size)
    tokens = np.empty(is_answer.shape, np.int64)
    weights = np.empty(is_answer.shape, np.float32)
    for row, sample in enumerate(samples):
        tokens[row], weights[row] = sample.tokens, sample.loss_weights
    return StepBatch(
        plan=plan,
        tokens=torch.from_numpy(tokens),
        weights=torch.from_numpy(weights),
        is_answer=torch.from_numpy(is_answer),
        sources=torch.from_numpy(sources),
    )


class Feed:
    """The batches from a step on, in order, with a few of them made ahead.

    Args:
        run: the config of the run.
        by_stage: what each stage draws from.
        first_step: the step of the first batch.
        rank, world_size: the number of this process, and how many there are.
    """

    def __init__(
        self, run: RunConfig, by_stage: tuple[Mixture, ...], *, first_step: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self._run, self._by_stage, self._rank, self._world_size = run, by_stage, rank, world_size
        self._steps = itertools.count(first_step)
        self._first_token = tokens_before(run, first_step) if run.data.order == DOCUMENTS else 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._coming: deque[Future[StepBatch]] = deque()
        for _ in range(AHEAD):
            self._order()

    def next(self) -> StepBatch:
        """Returns the next batch; what went wrong while it was made is raised here."""
        self._order()
        return self._coming.popleft().result()

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _order(self) -> None:
        self._coming.append(self._thread.submit(self._batch, next(self._steps)))

    def _batch(self, step: int) -> StepBatch:
        """Makes the batches one after the other, in the thread."""
        plan = plan_step(self._run, step)
        first_token, self._first_token = self._first_token, self._first_token + plan.num_rows * plan.length
        return make_batch(
            self._by_stage[plan.stage],
            plan,
            seed=self._run.train.seed,
            rank=self._rank,
            world_size=self._world_size,
            first_token=first_token,
        )


def open_corpus(run: RunConfig) -> TokenCorpus | None:
    """Opens the corpus of a run, None if it has none; that of the standard library is prepared if it is not there.

    Raises:
        CorpusError: the corpus is incomplete or damaged, or cannot be written.
    """
    if not run.data.corpus:
        return None
    if run.data.corpus != STDLIB:
        return TokenCorpus(Path(run.data.corpus).expanduser())
    return stdlib_corpus()


def mixtures(run: RunConfig, corpus: TokenCorpus | None) -> tuple[Mixture, ...]:
    """Makes what each stage draws its rows from.

    Raises:
        InvalidArgument: a stage's numbers do not fit together.
    """
    order = None
    if corpus is not None and run.data.order == DOCUMENTS:
        order = DocumentOrder(corpus, seed=run.train.seed)
    return tuple(_mixture(run, stage, corpus, order) for stage in run.stages)


def _mixture(
    run: RunConfig, stage: Stage, corpus: TokenCorpus | None, order: DocumentOrder | None = None
) -> Mixture:  # fmt: skip
    return Mixture(
        haystacks=tuple((_haystack(name, corpus), weight) for name, weight in stage.haystacks.items()),
        corpus=corpus,
        order=order,
        synthetic_share=stage.synthetic_share,
        chain_share=stage.chain_share,
        late_share=stage.late_share,
        similar_share=stage.similar_share,
        value_share=stage.value_share,
        task_share=stage.task_share,
        tasks=tuple(stage.tasks.items()),
        num_needles=stage.num_needles,
        num_queries=stage.num_queries,
        min_distance=run.model_in(stage).window if stage.min_distance is None else stage.min_distance,
        min_episode=stage.min_episode,
        text_weight=run.data.text_weight,
        answer_weight=run.data.answer_weight,
        corpus_weight=run.data.corpus_weight,
    )


def _haystack(name: str, corpus: TokenCorpus | None) -> Haystack:
    if name in MADE_HAYSTACKS:
        return MADE[name]
    assert corpus is not None  # checked by RunConfig
    return (assignment_haystack if name == ASSIGNMENT_HAYSTACK else corpus_haystack)(corpus)


def check_rows(run: RunConfig, by_stage: tuple[Mixture, ...], num_groups: int) -> None:
    """Checks that the model knows all tokens, and each stage has room for needles, enough text, and rows for all.

    Raises:
        InvalidArgument: a stage has not.
    """
    for corpus in (mixture.corpus for mixture in by_stage if mixture.corpus is not None):
        if corpus.manifest.vocab_size > run.model.vocab_size:
            raise InvalidArgument(
                f"model.vocab_size = {run.model.vocab_size} must be at least {corpus.manifest.vocab_size}, the "
                f"vocabulary of {corpus.directory}"
            )
    for number, (stage, mixture) in enumerate(zip(run.stages, by_stage, strict=True)):
        if stage.synthetic_share and stage.shortest < mixture.least_length:
            raise InvalidArgument(
                f"stages.{number}: rows of {stage.shortest} are too short for a retrieval sample with a distance of "
                f"{mixture.min_distance}; allowed is {mixture.least_length} or more"
            )
        if mixture.corpus is not None and stage.seq_len > len(mixture.corpus):
            raise InvalidArgument(
                f"stages.{number}.seq_len = {stage.seq_len} is more than the {len(mixture.corpus)} tokens of "
                f"{mixture.corpus.directory}"
            )
        if _num_rows(stage, stage.seq_len) < num_groups:
            raise InvalidArgument(
                f"stages.{number}.batch_tokens = {stage.batch_tokens} must be at least {num_groups * stage.seq_len}: a "
                f"row of {stage.seq_len} for each of {num_groups} processes or groups that share rows"
            )


def held_out_mixture(run: RunConfig, corpus: TokenCorpus | None) -> Mixture:
    """Makes what the last stage draws from, but of the validation split, which no step sees.

    A warning says if that split has no row of text (`lacks_text`); the haystacks of the mixture are noise then.

    Args:
        run: the config of the run.
        corpus: the corpus that it trains on.
    """
    stage = run.stages[-1]
    validation = TokenCorpus(corpus.directory, split=VALIDATION) if corpus is not None else None
    if validation is not None and lacks_text(stage, validation):
        warn_user(
            f"held_out_loss is not measured: the validation split of {validation.directory} has {len(validation)} "
            f"tokens, and a row has {stage.seq_len}; prepare more text, or with a larger --validation",
            HSACompileWarning,
        )
        stage = replace(stage, haystacks={NOISE: 1.0})
    return _mixture(run, stage, validation)


def lacks_text(stage: Stage, corpus: TokenCorpus | None) -> bool:
    """Says whether a stage draws from text, and the corpus has less of it than a row."""
    draws_text = stage.synthetic_share < 1 or any(
        name not in MADE_HAYSTACKS and weight > 0 for name, weight in stage.haystacks.items()
    )
    return draws_text and (0 if corpus is None else len(corpus)) < stage.seq_len


def digest(corpus: TokenCorpus | None) -> str:
    """Returns a digest of the text that is trained on; empty without a corpus."""
    return corpus.manifest.splits[TRAIN].tokens_sha256 if corpus is not None else ""
