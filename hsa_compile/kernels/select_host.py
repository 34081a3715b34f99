"""What the CPU kernels of select_chunks share: ties broken by place, and blocks dealt out fairly."""

import torch
from torch import Tensor


def stable_topk(scores: Tensor, count: int) -> Tensor:
    """Columns of the `count` largest entries of each row, the leftmost among equals, in rising order.

    Args:
        scores: `[n, m]`, no NaN.
        count: at most m.

    Returns:
        `[n, count]` int64.
    """
    if scores.shape[1] <= count:
        return torch.arange(scores.shape[1]).expand(scores.shape)
    # With one more than is wanted, a tie that matters shows: between the last that is in and the first that is out.
    best, columns = scores.topk(count + 1, dim=1)
    tied = (best[:, count - 1] == best[:, count]) & (best[:, count] > float("-inf"))
    if tied.any():
        columns[tied] = scores[tied].sort(dim=1, descending=True, stable=True).indices[:, : count + 1]
    return columns[:, :count].sort(dim=1).values


def in_turns(count: int) -> list[int]:
    """0 … count − 1, so ordered that each worker's contiguous share has early and late ones alike."""
    return sorted(range(count), key=lambda item: item % torch.get_num_threads())
