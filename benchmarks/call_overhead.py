"""What Python takes of a call of an op on a GPU, beside the kernels themselves; no GPU is needed:

    python benchmarks/call_overhead.py            # microseconds of the parts of a call
    python benchmarks/call_overhead.py --cpu      # of whole calls on this CPU, kernels included

Kernels are compiled for an H100 and launched on a device that is not there, by a launcher that does nothing; tensors
lie on the CPU. So what is missing is what the driver takes for a launch, about 3 µs each, and PyTorch for memory on a
GPU. The times are CPU seconds of this thread, the least of many short rounds, so that other processes hardly matter.
"""

import argparse
import functools
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

import torch

from hsa_compile import Problem, Schedule, Target, hsa_attention, hsa_decode, select_chunks
from hsa_compile.errors import HSACompileWarning
from hsa_compile.kernels import resolve
from hsa_compile.kernels.compile import compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.kernels.hsa_attention import dispatch as attention_ops
from hsa_compile.kernels.launch import QuickKernel
from hsa_compile.kernels.ops import inputs_of
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.target import PRODUCTS

H100 = PRODUCTS["h100"]
CALLS, ROUNDS = 8, 700  # a round is shorter than the slice of time that another process would take
PUBLIC = {"hsa_forward": hsa_attention, "hsa_decode": hsa_decode, "select_chunks": select_chunks}
# Narrow heads: the memory of a CPU, which takes longer for more, is not what is timed here.
_SHAPE = {"head_dim": 16, "chunk_size": 16, "dtype": "bfloat16"}
_ATTENTION = Problem(seq_len=64, kv_len=1024, num_heads=16, num_kv_heads=1, top_k=4, **_SHAPE)
_DECODE = Problem(op="hsa_decode", batch=4, seq_len=1, kv_len=1024, num_heads=2, num_kv_heads=1, top_k=16, **_SHAPE)
_SELECT = Problem(op="select_chunks", seq_len=500, kv_len=1024, num_heads=1, num_kv_heads=1, top_k=4, **_SHAPE)


def microseconds(call: Callable[[], object]) -> float:
    """CPU time of this thread for one call."""
    call()
    least = float("inf")
    for _ in range(ROUNDS):
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        least = min(least, time.thread_time() - start)
    return least / CALLS * 1e6


class Launcher:
    """Launches nothing; hooks are called as by Triton's own, which is written in C."""

    def __init__(self, source: object, metadata: object) -> None: ...

    def __call__(self, *arguments: Any) -> None:
        metadata, enter, leave = arguments[6:9]
        if enter is not None:
            enter(metadata)
        if leave is not None:
            leave(metadata)


class AbsentDevice:
    """A driver of an H100 that is not there; it is its own `utils`."""

    launcher_cls = Launcher

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.target, self.utils = GPUTarget("cuda", 90, 32), self

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": H100.shared_memory}

    def load_binary(self, *_: object) -> tuple[Any, ...]:
        return object(), 1, 64, 0, 1024  # module, function, registers, spills, the most threads


def cases() -> Iterator[tuple[Problem, Schedule]]:
    """The problems with their schedules: of `hsa_attention`, the first schedule of each dataflow."""
    space = SearchSpace.of(_ATTENTION, H100)
    one = replace(_ATTENTION, seq_len=1)
    yield one, SearchSpace.of(one, H100).default()
    for dataflow in space.choices:
        yield _ATTENTION, next(schedule for schedule in space.schedules() if schedule.dataflow == dataflow)
    for problem in (_DECODE, replace(_DECODE, paged=True), _SELECT):
        yield problem, SearchSpace.of(problem, H100).default()


def parts(problem: Problem, schedule: Schedule) -> dict[str, float]:
    """Microseconds of a call, of its layers, and of a call that records gradients; and the number of launches."""
    kernel = compile_kernel(emit(problem, schedule, H100))
    inputs = inputs_of(problem, torch.device("cpu"))
    arguments, options = inputs.call(problem)
    public = PUBLIC[problem.op]

    def entry() -> object:
        return kernel.entry(*inputs.arguments(problem.op), **inputs.options(problem.op))

    resolve.set_on_miss(None)  # what was resolved is forgotten
    resolve.resolve = lambda *_: kernel
    whole, below = microseconds(lambda: public(*arguments, **options)), microseconds(entry)
    launches = launches_of(entry)
    in_launches = sum(microseconds(lambda again=again: again()) for again in launches)
    found = {
        "call": whole,
        "checks, dispatcher, lookup": whole - below,
        "host code of the kernel": below - in_launches,
        f"launches ({len(launches)})": in_launches,
    }
    if problem.op != "hsa_decode":
        leaf = arguments[0].clone().requires_grad_()
        with torch.enable_grad():
            found["call with gradients"] = microseconds(lambda: public(leaf, *arguments[1:], **options))
    return found


def launches_of(entry: Callable[[], object]) -> list[Callable[[], None]]:
    """The launches of a call of an entry, each of which can be repeated."""
    launches: list[Callable[[], None]] = []
    launch = QuickKernel._launch

    def noted(*arguments: Any, **options: Any) -> None:
        launches.append(functools.partial(launch, *arguments, **options))
        launches[-1]()

    QuickKernel._launch = noted
    entry()
    QuickKernel._launch = launch
    return launches


def on_the_cpu() -> Iterator[tuple[str, float]]:
    """Whole calls of the smallest problems on this CPU, whose kernels have next to nothing to do."""
    shape = {"kv_len": 32, "num_kv_heads": 1, "head_dim": 16, "chunk_size": 16, "top_k": 1}
    for op, tokens, heads in (("hsa_forward", 1, 2), ("hsa_decode", 1, 2), ("select_chunks", 20, 1)):
        problem = Problem(op=op, seq_len=tokens, num_heads=heads, **shape)
        arguments, options = inputs_of(problem, torch.device("cpu")).call(problem)
        yield op, microseconds(functools.partial(PUBLIC[op], *arguments, **options))


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="calls on this CPU, with real kernels")
    given = parser.parse_args()
    warnings.simplefilter("ignore", HSACompileWarning)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache, torch.no_grad():
        os.environ["HSA_COMPILE_CACHE_DIR"] = cache
        if given.cpu:
            for op, us in on_the_cpu():
                print(f"{op:16} {us:6.1f} µs")
            return
        import triton

        triton.runtime.driver.set_active(AbsentDevice())
        Target.of = staticmethod(lambda device: H100)
        attention_ops._check_values = lambda *_: None  # on a GPU no value is looked at
        for problem, schedule in cases():
            found = [f"{name} {us:.1f}" for name, us in parts(problem, schedule).items()]
            print(f"{problem.describe()}, {schedule}\n    {', '.join(found)} µs")


if __name__ == "__main__":
    main()
