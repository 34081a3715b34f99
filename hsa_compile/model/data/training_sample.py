"""A row of training data: its tokens, and what each counts in the loss."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

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


def corpus_sample(corpus: TokenCorpus, *, length: int, seed: int, index: int, weight: float = 1.0) -> TrainingSample:
    """A window of plain text; all its tokens but the first count the same."""
    loss_weights = np.full(length, weight, np.float32)
    loss_weights[0] = 0
    return TrainingSample(tokens=corpus.sample(index, length, seed=seed), loss_weights=loss_weights)
