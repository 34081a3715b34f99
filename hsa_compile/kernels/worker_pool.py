"""Runs the tiles of an emitted CPU kernel on all threads: tiles run in parallel, rather than parts of an operator."""

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

R = TypeVar("R")


def run_on_workers(task: Callable[[int, int], R], count: int) -> list[tuple[int, int, R]]:
    """Splits `count` items into one contiguous range for each worker and calls `task(first, last)` for each range.

    There are as many workers as `torch.get_num_threads()`; inside one, operators use a single thread, record no
    gradients and do not autocast. The split depends on nothing else, so sums over workers are reproducible.

    Returns:
        `(first, last, result)` for each range, in order.
    """
    num_workers = max(1, min(torch.get_num_threads(), count))
    bounds = [count * i // num_workers for i in range(num_workers + 1)]
    ranges = list(itertools.pairwise(bounds))
    if num_workers == 1:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return [(first, last, task(first, last)) for first, last in ranges]
    futures = [_pool(num_workers).submit(_run, task, first, last) for first, last in ranges]
    return [(first, last, future.result()) for (first, last), future in zip(ranges, futures, strict=True)]


def _run(task: Callable[[int, int], R], first: int, last: int) -> R:
    with torch.no_grad():
        return task(first, last)


@functools.cache
def _pool(num_workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_workers, "hsa-compile", initializer=torch.set_num_threads, initargs=(1,))


# A forked child has the pool's object but none of its threads, so it begins with a new one.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
