"""Rows of training data: which ones a step takes, and how they are stacked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.data.corpus import TokenCorpus


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingSample:
    """One row.

    Attributes:
        tokens: `[length]`, unsigned integers.
        loss_weights: `[length]` of float32: what the prediction of `tokens[i]` from `tokens[:i]` counts in the loss;
            that of the first token is 0.
        answer_spans: (start, end) of the answers to questions; none in plain text.
    """

    tokens: npt.NDArray[np.unsignedinteger[Any]]
    loss_weights: npt.NDArray[np.float32]
    answer_spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Rows of equal length.

    Attributes:
        tokens: `[B, T]` of int64.
        loss_weights: `[B, T]` of float32, as in `TrainingSample`.
    """

    tokens: npt.NDArray[np.int64]
    loss_weights: npt.NDArray[np.float32]


def corpus_sample(corpus: TokenCorpus, *, length: int, seed: int, index: int, weight: float = 1.0) -> TrainingSample:
    """A window of plain text; all its tokens but the first count the same."""
    loss_weights = np.full(length, weight, np.float32)
    loss_weights[0] = 0
    return TrainingSample(tokens=corpus.sample(index, length, seed=seed), loss_weights=loss_weights)


def row_indices(step: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> range:
    """The samples of one process in one step: together the processes take those that one alone would take.

    Args:
        step: from 0.
        batch_size: of all processes together.
        rank: of this process.
        world_size: number of processes, which divides `batch_size`.

    Raises:
        InvalidArgument: it does not, or there is no such rank.
    """
    if batch_size % world_size or not 0 <= rank < world_size:
        raise InvalidArgument(
            f"batch_size {batch_size}, rank {rank}, world_size {world_size}; allowed are batches that the number of "
            "processes divides, and ranks below it"
        )
    own = batch_size // world_size
    begin = step * batch_size + rank * own
    return range(begin, begin + own)


def stack(samples: Sequence[TrainingSample]) -> Batch:
    """A batch of rows that have the same length."""
    return Batch(
        tokens=np.stack([sample.tokens for sample in samples]).astype(np.int64),
        loss_weights=np.stack([sample.loss_weights for sample in samples]),
    )
