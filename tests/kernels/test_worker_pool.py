"""A call that runs on workers ends after the last of them, whatever ends it, and changes nothing for other threads."""

import gc
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hsa_compile.kernels import worker_pool
from hsa_compile.kernels.native import pointer
from hsa_compile.kernels.worker_pool import run_on_workers


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_an_error_in_one_worker_is_raised_after_the_others_have_returned() -> None:
    both, returned = threading.Barrier(2), []

    def task(first: int, last: int) -> None:
        both.wait()
        if first == 0:
            raise ValueError("this range is bad")
        time.sleep(0.05)
        returned.append(last)

    with pytest.raises(ValueError, match="this range is bad"):
        run_on_workers(task, 4)
    assert returned == [4]


def test_ctrl_c_pressed_twice_is_raised_after_all_workers_have_returned() -> None:
    caller, both, returned = threading.get_ident(), threading.Barrier(2), []

    def task(first: int, last: int) -> None:
        both.wait()
        for _ in range(2 if first == 0 else 0):
            signal.pthread_kill(caller, signal.SIGINT)
            time.sleep(0.05)
        both.wait()
        time.sleep(0.05)
        returned.append(last)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            run_on_workers(task, 4)
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(returned) == [2, 4]
    assert run_on_workers(lambda first, last: last - first, 5) == [(0, 2, 2), (2, 5, 3)]


def test_a_pool_that_takes_no_more_work_leaves_it_to_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    # So is every pool when the interpreter ends, where `atexit` may still call an op.
    pool = ThreadPoolExecutor(2)
    pool.shutdown()
    monkeypatch.setattr(worker_pool, "_pool", lambda num_workers: pool)
    assert run_on_workers(lambda first, last: last - first, 5) == [(0, 2, 2), (2, 5, 3)]


def in_a_new_thread(call: Callable[[], int]) -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def ranges_together(count: int) -> list[int]:
    """How many threads an operator uses in each range; all ranges are at work at once."""
    together = threading.Barrier(count)

    def task(first: int, last: int) -> int:
        together.wait()
        return torch.get_num_threads()

    return [result for _, _, result in run_on_workers(task, count)]


@pytest.mark.parametrize("num_threads", [2, 3])
def test_workers_use_one_thread_and_others_keep_theirs(num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "_pool", worker_pool._Pool())
    torch.set_num_threads(num_threads)
    assert ranges_together(num_threads) == [1] * num_threads
    assert torch.get_num_threads() == num_threads
    assert in_a_new_thread(torch.get_num_threads) == num_threads
    assert ranges_together(num_threads) == [1] * num_threads


def test_calls_of_any_width_share_the_threads_of_the_widest(monkeypatch: pytest.MonkeyPatch) -> None:
    before, pool = set(threading.enumerate()), worker_pool._Pool()

    def begun() -> int:
        return len(set(threading.enumerate()) - before)

    monkeypatch.setattr(worker_pool, "_pool", pool)
    torch.set_num_threads(4)
    for count in (2, 4, 3):
        assert ranges_together(count) == [1] * count
    assert begun() == 4
    narrow = pool(4)
    torch.set_num_threads(6)
    assert ranges_together(6) == [1] * 6
    narrow.shutdown()  # waits for its threads to end, which they were told to
    assert begun() == 6
    pool(6).shutdown()
    assert begun() == 0


def test_threads_that_cannot_begin_leave_the_work_to_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "_pool", worker_pool._Pool())
    start, begun = threading.Thread.start, list[threading.Thread]()

    def start_one(thread: threading.Thread) -> None:
        if begun:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_one)
    assert run_on_workers(lambda first, last: last - first, 5) == [(0, 2, 2), (2, 5, 3)]
    monkeypatch.undo()
    assert not begun[0].is_alive()
    assert in_a_new_thread(torch.get_num_threads) == 2


def test_workers_are_in_inference_mode_where_the_caller_is() -> None:
    with torch.inference_mode():
        x = torch.zeros(2, 3)
        run_on_workers(lambda first, last: x[first:last].add_(1), 2)
        assert x.is_inference()
        assert (x == 1).all()
    modes = run_on_workers(lambda first, last: (torch.is_inference_mode_enabled(), torch.is_grad_enabled()), 2)
    assert [mode for _, _, mode in modes] == [(False, False)] * 2


def test_a_pointer_keeps_its_tensor_alive() -> None:
    x = torch.zeros(3)
    address, alive = pointer(x), weakref.ref(x)
    del x
    gc.collect()
    assert alive() is not None
    del address
    gc.collect()
    assert alive() is None
