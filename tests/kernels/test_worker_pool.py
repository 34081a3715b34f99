"""A call that runs on workers ends after the last of them, whatever ends it."""

import gc
import signal
import threading
import time
import weakref
from collections.abc import Iterator
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


def test_a_pointer_keeps_its_tensor_alive() -> None:
    x = torch.zeros(3)
    address, alive = pointer(x), weakref.ref(x)
    del x
    gc.collect()
    assert alive() is not None
    del address
    gc.collect()
    assert alive() is None
