"""What an op does on one problem under a schedule, counted: FLOPs and bytes, for the roofline."""

from dataclasses import dataclass

from hsa_compile.device_peaks import Limits
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Schedule

OVERLAP = 0.8  # of the picks of neighbouring tokens, as in the `local` inputs; what `union` saves hangs on it


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one op on one problem does under a schedule.

    Attributes:
        flops: of all matrix products, padding not counted.
        memory_bytes: every tensor once, as if the cache held the rest.
        cache_bytes: what the programs read and write, from wherever it comes.
    """

    flops: float
    memory_bytes: float
    cache_bytes: float


def count_work(problem: Problem, schedule: Schedule) -> Work:
    """FLOPs and bytes of an op, by the dataflow of its schedule (all slots filled)."""
    if problem.selects:
        return _count_selection(problem, schedule)
    size, backward = problem.itemsize, problem.op == "hsa_backward"
    tokens = problem.batch * problem.seq_len
    rows = tokens * problem.num_heads * problem.top_k
    lists = tokens * problem.num_kv_heads * problem.top_k
    D, Dv, C = problem.head_dim, problem.value_dim, problem.chunk_size
    q_bytes = tokens * problem.num_heads * D * size
    o_bytes = tokens * problem.num_heads * Dv * size
    kv_bytes = problem.batch * problem.kv_len * problem.num_kv_heads * (D + Dv) * size
    if problem.decodes:  # of the whole context, the picked chunks alone
        kv_bytes = lists * C * (D + Dv) * size
    pick_bytes = lists * 8
    two_pass = backward and schedule.dataflow != "chunk"
    products = D + Dv if not backward else 4 * D + 3 * Dv if two_pass else 3 * D + 2 * Dv
    memory = (q_bytes + o_bytes + kv_bytes) * (2 if backward else 1) + pick_bytes

    shared = 1.0
    if schedule.dataflow == "union":  # M tokens read the union of their picks once
        shared = (1 + (schedule.number("block_m") - 1) * (1 - OVERLAP)) / schedule.number("block_m")
    by_token = shared * lists * C * (D + Dv) * size + q_bytes + o_bytes * (2 if backward else 1)
    by_chunk = kv_bytes + rows * D * size + rows * Dv * 8  # a row of q in, a float32 row of o read and added to
    if backward:
        by_chunk = kv_bytes * 2 + rows * (D + Dv) * size + rows * D * 8
    cache = by_chunk if schedule.dataflow == "chunk" else by_token
    if two_pass:
        cache += kv_bytes * 2 + rows * (D + Dv) * size
    return Work(flops=2.0 * rows * C * products, memory_bytes=memory, cache_bytes=cache + pick_bytes)


def _count_selection(problem: Problem, schedule: Schedule) -> Work:
    """Scores of all visible landmarks, read once a block of tokens; backward, K landmarks a token."""
    tokens = problem.batch * problem.seq_len * problem.num_kv_heads
    row = problem.head_dim * problem.itemsize
    landmarks = problem.batch * problem.num_kv_heads * problem.num_chunks
    results = tokens * problem.top_k * 8
    if problem.op == "select_chunks_backward":
        flops = 6.0 * tokens * problem.top_k * problem.head_dim  # the score again, and both gradients
        memory = 2 * (tokens + landmarks) * row + results
        return Work(flops=flops, memory_bytes=memory, cache_bytes=memory + 2 * tokens * problem.top_k * row)
    visible = max(0.5, 1 - problem.seq_len / (2 * problem.kv_len)) * problem.num_chunks
    block = schedule.number("block_t") if "block_t" in schedule else 1
    memory = (tokens + landmarks) * row + results
    return Work(
        flops=2.0 * tokens * visible * problem.head_dim,
        memory_bytes=memory,
        cache_bytes=memory + tokens / block * visible * row,
    )


def clocks(work: Work, itemsize: int, limits: Limits) -> dict[str, float]:
    """Milliseconds that each part of a device needs at its peak: `matrix`, `memory`, `cache`; the slowest is a bound.

    Args:
        work: of one or several ops.
        itemsize: bytes of an element, which decides between the peaks of products.
        limits: of the device.
    """
    peak = limits.float32_tflops if itemsize == 4 else limits.tflops
    return {
        "matrix": work.flops / (peak * 1e9),
        "memory": work.memory_bytes / (limits.memory_gb_s * 1e6),
        "cache": work.cache_bytes / (limits.cache_gb_s * 1e6),
    }
