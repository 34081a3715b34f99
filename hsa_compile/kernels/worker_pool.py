"""Runs the tiles of an emitted CPU kernel on all threads: tiles run in parallel, rather than parts of an operator."""

import functools
import itertools
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch

R = TypeVar("R")


def run_on_workers(task: Callable[[int, int], R], count: int) -> list[tuple[int, int, R]]:
    """Splits `count` items into one contiguous range for each worker and calls `task(first, last)` for each range.

    There are as many workers as `torch.get_num_threads()`; inside one, operators use a single thread, record no
    gradients and do not autocast. The split depends on nothing else, so sums over workers are reproducible.

    Whatever ends the call, an error in a worker or Ctrl-C, it ends after the last worker has returned: until then
    workers write into the caller's tensors, native code even through bare pointers.

    Returns:
        `(first, last, result)` for each range, in order.
    """
    num_workers = max(1, min(torch.get_num_threads(), count))
    bounds = [count * i // num_workers for i in range(num_workers + 1)]
    ranges = list(itertools.pairwise(bounds))
    todo, results = deque(ranges), {}

    def work() -> None:
        with torch.no_grad():
            while todo:
                try:
                    first, last = todo.popleft()
                except IndexError:  # another worker was faster
                    return
                results[first] = task(first, last)

    futures: list[Future[None]] = []
    try:
        if num_workers > 1:
            _submit(work, num_workers, futures)
        if len(futures) < num_workers:
            with torch.autocast("cpu", enabled=False):
                work()
        for future in futures:
            future.result()
    finally:
        todo.clear()
        _wait_for(futures)
    return [(first, last, results[first]) for first, last in ranges]


def _submit(work: Callable[[], None], count: int, futures: list[Future[None]]) -> None:
    try:
        for _ in range(count):
            futures.append(_pool(count).submit(work))
    except RuntimeError:
        pass  # the interpreter is ending, or there can be no more threads: the caller does what is left


def _wait_for(futures: list[Future[Any]]) -> None:
    """Waits until the last has ended; what Ctrl-C or another signal raises meanwhile is raised after that."""
    try:
        wait(futures)
    except BaseException:
        _wait_for(futures)  # Ctrl-C may come again
        raise


@functools.cache
def _pool(num_workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_workers, "hsa-compile", initializer=torch.set_num_threads, initargs=(1,))


# A forked child has the pool's object but none of its threads, so it begins with a new one.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
