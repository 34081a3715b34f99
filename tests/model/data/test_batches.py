"""Which rows a step takes, and how they are stacked."""

import numpy as np
import pytest

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.data.batches import TrainingSample, row_indices, stack


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_together_take_the_rows_of_one(world_size: int) -> None:
    taken = [
        index
        for step in range(3)
        for rank in range(world_size)
        for index in row_indices(step, batch_size=8, rank=rank, world_size=world_size)
    ]
    assert taken == list(range(24))


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="batch_size 7"):
        row_indices(0, batch_size=7, world_size=2)
    with pytest.raises(InvalidArgument, match="rank 2"):
        row_indices(0, batch_size=8, rank=2, world_size=2)


def test_rows_become_a_batch() -> None:
    rows = [
        TrainingSample(tokens=np.array([250, row], np.uint8), loss_weights=np.array([0, row], np.float32))
        for row in range(3)
    ]
    batch = stack(rows)
    assert batch.tokens.dtype == np.int64
    assert batch.tokens.tolist() == [[250, 0], [250, 1], [250, 2]]
    assert batch.loss_weights.tolist() == [[0, 0], [0, 1], [0, 2]]
