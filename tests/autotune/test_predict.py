from dataclasses import replace

import pytest

from hsa_compile.autotune.cost.roofline import occupancy, predict
from hsa_compile.errors import InvalidTarget
from hsa_compile.kernels.ahead_of_time import KernelResources
from hsa_compile.peaks import LIMITS
from hsa_compile.problem import Problem
from hsa_compile.schedules.ops import count_work
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import NAMED_TARGETS

PROBLEM = Problem(
    seq_len=65536, num_heads=32, num_kv_heads=2, head_dim=128, chunk_size=64, top_k=16, dtype="bfloat16"
)  # fmt: skip
TOKEN = Schedule.of("token", num_warps=4, num_stages=2)
CHUNK = Schedule.of("chunk")
H100 = NAMED_TARGETS["sm_90"]


def test_forward_flops_are_two_products_of_every_row_and_key() -> None:
    rows = 65536 * 32 * 16
    assert count_work(PROBLEM, TOKEN).flops == 2 * rows * 64 * (128 + 128)


def test_backward_is_five_products_in_one_pass_and_seven_in_two() -> None:
    forward = count_work(PROBLEM, CHUNK).flops
    backward = PROBLEM.with_op("hsa_backward")
    assert count_work(backward, CHUNK).flops == forward / 2 * 5
    assert count_work(backward, TOKEN).flops == forward / 2 * 7


def test_the_token_dataflow_reads_keys_for_each_token_and_the_chunk_dataflow_does_not() -> None:
    few_heads = replace(PROBLEM, num_kv_heads=32)
    assert count_work(few_heads, TOKEN).cache_bytes > 10 * count_work(few_heads, CHUNK).cache_bytes


def test_the_time_is_that_of_the_slowest_clock() -> None:
    work = count_work(PROBLEM, TOKEN)
    prediction = predict(PROBLEM, work, H100)
    limits = LIMITS["sm_90"]
    assert prediction.time_ms >= work.flops / limits.tflops / 1e9
    assert prediction.time_ms >= work.memory_bytes / limits.memory_gb_s / 1e6
    assert prediction.bound == "cache"


def test_occupancy_falls_with_registers_and_shared_memory() -> None:
    resources = KernelResources(
        name="k", registers=128, spills=0, shared_memory=0, num_warps=4, matrix_instruction="none"
    )  # fmt: skip
    assert occupancy(resources, H100) == 4 * 128 / 2048
    assert occupancy(replace(resources, registers=64), H100) == 8 * 128 / 2048
    assert occupancy(replace(resources, shared_memory=100 * 1024), H100) == 2 * 128 / 2048


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(InvalidTarget, match="sm_75 are not known; known are sm_80"):
        predict(PROBLEM, count_work(PROBLEM, TOKEN), replace(H100, arch="sm_75"))
