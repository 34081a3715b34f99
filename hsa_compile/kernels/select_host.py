"""What the CPU kernels of `select_chunks` share: a top-k that breaks ties by place, and a fair order of blocks."""

import torch
from torch import Tensor


def stable_topk(scores: Tensor, count: int) -> Tensor:
    """Returns the columns of the `count` largest entries of each row, the leftmost among equals, in rising order.

    NaN is larger than any number, as when PyTorch sorts, and equal to NaN.

    Args:
        scores: `[n, m]`.
        count: how many columns to return, at most m.

    Returns:
        `[n, count]` int64.
    """
    if scores.shape[1] <= count:
        return torch.arange(scores.shape[1]).expand(scores.shape)
    # One entry more than is wanted shows a tie that matters: between the last that is in and the first that is out.
    best, columns = scores.topk(count + 1, dim=1)
    inside, outside = best[:, count - 1], best[:, count]
    tied = ((inside == outside) & (outside > float("-inf"))) | outside.isnan()
    if tied.any():
        columns[tied] = scores[tied].sort(dim=1, descending=True, stable=True).indices[:, : count + 1]
    return columns[:, :count].sort(dim=1).values


def in_turns(count: int) -> list[int]:
    """Returns 0 … count − 1 in an order in which each worker's contiguous share has early and late ones alike."""
    return sorted(range(count), key=lambda item: item % torch.get_num_threads())
