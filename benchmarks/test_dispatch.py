"""What a call costs beside its kernel: a lookup in memory, and `hsa_attention` over the bare kernel, in one run."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hsa_compile import Problem, ScheduleCache, Target, hsa_attention, resolve, tune
from hsa_compile.kernels.hsa_attention.inputs import make_inputs

Call = Callable[[], object]

CALLS, ROUNDS = 20, 800  # a round is shorter than the slice of time that another process would take
LOOKUP_GOAL_US, OVERHEAD_GOAL_US = 5, 30

# One token, one chunk: next to nothing to compute.
PROBLEM = Problem(seq_len=1, kv_len=32, num_heads=2, num_kv_heads=1, head_dim=16, chunk_size=16, top_k=1)

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")


def best_us(calls: list[Call]) -> list[float]:
    """Microseconds of each call, in turns; the least of many rounds, since what else runs can only add."""
    best = [float("inf")] * len(calls)
    for _ in range(ROUNDS):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            best[i] = min(best[i], (time.perf_counter() - start) / CALLS * 1e6)
    return best


def test_lookup_of_a_tuned_problem(benchmark, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, cache = Target.parse("cpu"), ScheduleCache(tmp_path)
    cache.put(tune(PROBLEM, target, trials=1))
    assert cache.lookup(PROBLEM, target) is not None
    (microseconds,) = best_us([lambda: cache.lookup(PROBLEM, target)])
    with capsys.disabled():
        print(f"\n  lookup in memory {microseconds:.2f} µs (goal {LOOKUP_GOAL_US})")
    benchmark.extra_info["lookup_us"] = microseconds
    benchmark(cache.lookup, PROBLEM, target)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_overhead_of_the_op(requires_grad: bool, benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = make_inputs(PROBLEM, torch.device("cpu"))
    q, k, v, weights = (x.requires_grad_(requires_grad) for x in (inputs.q, inputs.k, inputs.v, inputs.chunk_weights))
    kernel = resolve(PROBLEM, Target.parse("cpu"))
    bare_tensors = [x.detach() for x in (q, k, v, inputs.chunk_indices, weights)]

    def bare() -> object:
        return kernel.entry(*bare_tensors, scale=0.25)

    def op() -> object:
        return hsa_attention(q, k, v, inputs.chunk_indices, weights, chunk_size=PROBLEM.chunk_size)

    torch.testing.assert_close(op(), bare())
    bare_us, op_us = best_us([bare, op])
    with capsys.disabled():
        overhead = f"{op_us - bare_us:.1f} µs (goal {OVERHEAD_GOAL_US})"
        print(f"\n  hsa_attention {op_us:.1f} µs, bare kernel {bare_us:.1f} µs, overhead {overhead}")
    benchmark.extra_info.update(op_us=op_us, bare_us=bare_us)
    benchmark(op)
