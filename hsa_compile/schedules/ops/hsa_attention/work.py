"""FLOPs and bytes of `hsa_attention`, forward and backward, by the dataflow of a schedule."""

from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.work import OVERLAP, Work


def attention_work(problem: Problem, schedule: Schedule) -> Work:
    """FLOPs and bytes of one pass when all slots are filled."""
    size, backward = problem.itemsize, problem.op == "hsa_backward"
    tokens = problem.batch * problem.seq_len
    rows = tokens * problem.num_heads * problem.top_k
    lists = tokens * problem.num_kv_heads * problem.top_k
    D, Dv, C = problem.head_dim, problem.value_dim, problem.chunk_size
    q_bytes = tokens * problem.num_heads * D * size
    o_bytes = tokens * problem.num_heads * Dv * size
    kv_bytes = problem.batch * problem.kv_len * problem.num_kv_heads * (D + Dv) * size
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
