"""What a kernel should cost on a device that may not be there: work by counting, time by roofline."""

from dataclasses import dataclass, replace

from hsa_compile.errors import InvalidTarget
from hsa_compile.kernels.ahead_of_time import KernelResources
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import PRODUCTS, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What bounds a kernel on one device; peak figures of the vendors' data sheets, dense.

    Attributes:
        tflops: of 16-bit matrix products.
        float32_tflops: of float32 products that keep all bits.
        memory_gb_s, cache_gb_s: bandwidth of device memory and of the last cache that all programs share.
        cache_mb: size of that cache.
        clock_mhz: boost clock, at which the peaks hold.
        registers, threads, programs: of one multiprocessor, what its resident programs share.
        shared_memory: bytes of one multiprocessor.
        register_unit: registers are given to a warp in steps of this many for each thread.
    """

    tflops: float
    float32_tflops: float
    memory_gb_s: float
    cache_gb_s: float
    cache_mb: float
    clock_mhz: int
    registers: int
    threads: int
    programs: int
    shared_memory: int
    register_unit: int = 8


_NVIDIA = {"registers": 65536, "threads": 2048, "programs": 32}
_CDNA3 = {"registers": 4 * 512 * 64, "threads": 4 * 10 * 64, "programs": 16, "shared_memory": 64 * 1024}

# By architecture: A100 SXM 80 GB, H100 SXM, B200, MI300X. Sources: NVIDIA A100, H100, H200 and Blackwell (HGX B200)
# data sheets and architecture white papers, CUDA programming guide (table of compute capabilities); AMD Instinct
# MI300X data sheet and CDNA 3 white paper. Cache bandwidths are not published: measurements by others, rounded.
LIMITS = {
    "sm_80": Limits(tflops=312, float32_tflops=19.5, memory_gb_s=2039, cache_gb_s=4700, cache_mb=40, clock_mhz=1410,
                    shared_memory=164 * 1024, **_NVIDIA),
    "sm_90": Limits(tflops=989, float32_tflops=67, memory_gb_s=3350, cache_gb_s=5600, cache_mb=50, clock_mhz=1830,
                    shared_memory=228 * 1024, **_NVIDIA),
    "sm_100": Limits(tflops=2250, float32_tflops=75, memory_gb_s=8000, cache_gb_s=10000, cache_mb=126, clock_mhz=1965,
                     shared_memory=228 * 1024, **_NVIDIA),
    "gfx942": Limits(tflops=1307, float32_tflops=163, memory_gb_s=5300, cache_gb_s=11900, cache_mb=256, clock_mhz=2100,
                     **_CDNA3),
}  # fmt: skip
# Products that differ from the first of their architecture.
_PRODUCT_LIMITS = {PRODUCTS["h200"].name: replace(LIMITS["sm_90"], memory_gb_s=4800)}


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The roofline: the slowest of three clocks, and which it is (`matrix`, `memory` or `cache`)."""

    time_ms: float
    bound: str


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


def predict(problem: Problem, work: Work, target: Target) -> Prediction:
    """The time that the busiest part of the device needs at its peak: a lower bound, good for comparing.

    Raises:
        InvalidTarget: the architecture's peaks are not known.
    """
    limits = limits_of(target)
    peak = limits.float32_tflops if problem.itemsize == 4 else limits.tflops
    clocks = {
        "matrix": work.flops / (peak * 1e9),
        "memory": work.memory_bytes / (limits.memory_gb_s * 1e6),
        "cache": work.cache_bytes / (limits.cache_gb_s * 1e6),
    }
    bound = max(clocks, key=lambda name: clocks[name])
    return Prediction(time_ms=clocks[bound], bound=bound)


def occupancy(resources: KernelResources, target: Target) -> float:
    """Share of a multiprocessor's threads that resident programs of a kernel fill, 0 … 1."""
    threads = resources.num_warps * target.warp_size
    return resident_programs(resources, target) * threads / limits_of(target).threads


def resident_programs(resources: KernelResources, target: Target) -> int:
    """Programs of a kernel that one multiprocessor holds at once."""
    limits = limits_of(target)
    threads = resources.num_warps * target.warp_size
    registers = -(-max(resources.registers, 1) // limits.register_unit) * limits.register_unit
    return min(
        limits.programs,
        limits.threads // threads,
        limits.registers // (registers * threads),
        limits.shared_memory // max(resources.shared_memory + 1024, 1),
    )


def limits_of(target: Target) -> Limits:
    """Peaks of a target's architecture.

    Raises:
        InvalidTarget: they are not known.
    """
    if target.arch not in LIMITS:
        raise InvalidTarget(f"peaks of {target.arch} are not known; known are {', '.join(LIMITS)}")
    return _PRODUCT_LIMITS.get(target.name, LIMITS[target.arch])
