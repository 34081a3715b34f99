"""Runs the tiles of an emitted CPU kernel on all threads, and adds up what the workers found.

Tiles run in parallel, rather than parts of an operator.
"""

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")


def run_on_workers(task: Callable[[int, int], R], count: int) -> list[tuple[int, int, R]]:
    """Splits `count` items into one contiguous range for each worker and calls `task(first, last)` for each range.

    There are as many workers as `torch.get_num_threads()`; inside one, operators use a single thread, record no
    gradients, do not autocast, and are in inference mode where the caller is. The split depends on nothing else, so
    sums over workers are reproducible.

    Whatever ends the call, an error in a worker or Ctrl-C, it ends after the last worker has returned: until then
    workers write into the caller's tensors, native code even through bare pointers.

    Returns:
        `(first, last, result)` for each range, in order.
    """
    num_workers = max(1, min(torch.get_num_threads(), count))
    bounds = [count * i // num_workers for i in range(num_workers + 1)]
    ranges = list(itertools.pairwise(bounds))
    todo, results = deque(ranges), {}
    # In inference mode the caller's tensors are such that no other thread may write to.
    without_gradients = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad

    def work() -> None:
        with without_gradients():
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
        pool = _pool(count)
        for _ in range(count):
            futures.append(pool.submit(work))
    except RuntimeError:
        pass  # the interpreter is ending, or there can be no more threads: the caller does what is left


def _wait_for(futures: list[Future[Any]]) -> None:
    """Waits until the last has ended; what Ctrl-C or another signal raises meanwhile is raised after that."""
    try:
        wait(futures)
    except BaseException:
        _wait_for(futures)  # Ctrl-C may come again
        raise


class _Pool:
    """The threads of all calls: as many as the widest call so far asked for."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._making = threading.Lock()
        self._num_workers = 0
        self._executor: ThreadPoolExecutor | None = None

    def __call__(self, num_workers: int) -> ThreadPoolExecutor:
        """Returns the executor, which has at least so many threads, all of them begun.

        Raises:
            RuntimeError: there can be no more threads.
        """
        with self._making:
            if self._executor is None or self._num_workers < num_workers:
                before, self._num_workers = self._executor, max(num_workers, torch.get_num_threads())
                self._executor = None
                if before is not None:
                    before.shutdown(wait=False)  # whoever still submits to it does the work without it
                self._executor = _begin(self._num_workers)
            return self._executor


def _begin(num_workers: int) -> ThreadPoolExecutor:
    """Makes an executor and begins its threads at once.

    To use one thread, each of them has to set what is also the process's number, which PyTorch gives to each thread
    that begins later. So the caller's number is set again when all have begun.
    """
    num_threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(num_workers, "hsa-compile", initializer=_use_one_thread)
    all_begun = threading.Barrier(num_workers + 1)
    try:
        for _ in range(num_workers):
            executor.submit(all_begun.wait)
        all_begun.wait()
    except BaseException:
        all_begun.abort()
        executor.shutdown()
        raise
    finally:
        torch.set_num_threads(num_threads)
    return executor


def _use_one_thread() -> None:
    torch.get_num_threads()  # else the first operator would take the process's number
    torch.set_num_threads(1)


_pool = _Pool()
# A forked child has the pool's object but none of its threads, so it begins with a new one.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.forget)


def add_chunk_gradients(
    x: Tensor, parts: list[tuple[int, Tensor]], chunk_size: int, chunk_starts: Tensor | None
) -> Tensor:
    """Adds the workers' parts in a fixed order, so that every run gives the same bits.

    Args:
        x: `[B, S, H, D]`, the keys or values.
        parts: for each worker its first (batch, kv head) pair and `[pairs, N·C, D]`, rows chunk by chunk.
        chunk_size: `C`.
        chunk_starts: `[N]`, the row where each chunk begins; `chunk · C` if None.

    Returns:
        the gradient of x, in its shape and dtype; rows that belong to no chunk are zero.
    """
    gradient = torch.zeros(x.shape, dtype=parts[0][1].dtype)
    num_kv_heads, whole = x.shape[2], parts[0][1].shape[1]
    if chunk_starts is not None:
        rows = (chunk_starts.long().unsqueeze(1) + torch.arange(chunk_size)).flatten()  # [N·C]
    for first_pair, part in parts:
        for i, one in enumerate(part):
            b, h = divmod(first_pair + i, num_kv_heads)
            if chunk_starts is None:
                gradient[b, :whole, h] += one
            else:
                gradient[b, :, h].index_add_(0, rows, one)  # starts of unused chunks repeat, with zeros
    return gradient.to(x.dtype)
