"""Why a schedule cannot run a problem: what `SearchSpace.why_invalid` asks, family by family."""

from collections.abc import Sequence

from hsa_compile.problem import Problem, next_power_of_2
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import Target

SMALLEST_SUPER_TILE = 512  # of the PyTorch family, where each tile costs operators
SMALLEST_CPP_SUPER_TILE = 128
MAX_GATHER_BYTES = 1 << 28  # of one batched product of the PyTorch token dataflow

_MIN_TRITON_ROWS = 16  # what a matrix instruction needs
_MAX_TRITON_ROWS = 256  # beyond, the accumulators spill on every GPU
MAX_HIP_WARPS = 4  # more halve the registers of a wavefront, and most kernels spill
_MAX_PANEL = 4  # vectors in a row of a C++ register tile

# Floats of a vector register, and registers that a tile may fill: what is left holds a row and a broadcast.
_VECTORS = {"avx512": (16, 28), "avx2": (8, 12)}
_OTHER_VECTORS = (4, 24)  # of Arm's 32


def vector_lanes(arch: str) -> int:
    """Floats of a vector register of a CPU."""
    return _VECTORS.get(arch, _OTHER_VECTORS)[0]


def vector_columns(size: int, lanes: int) -> int:
    """Vectors in a row of a register tile that covers `size` floats in panels of equal width, four at most."""
    vectors = -(-size // lanes)
    panels = -(-vectors // _MAX_PANEL)
    return -(-vectors // panels)


def gathered_bytes(problem: Problem) -> int:
    """Bytes of keys and values that the PyTorch token dataflow gathers for one token."""
    return problem.top_k * problem.chunk_size * (problem.head_dim + problem.value_dim) * max(problem.itemsize, 4)


def why_not_torch(problem: Problem, schedule: Schedule) -> str | None:
    """The first reason against a schedule of the PyTorch family."""
    if schedule.dataflow == "token":
        gathered = schedule.number("block_t") * gathered_bytes(problem)
        if schedule.number("block_t") != 1 and gathered > MAX_GATHER_BYTES:
            return f"a block of {schedule['block_t']} tokens gathers {gathered} bytes, at most {MAX_GATHER_BYTES}"
        if schedule.number("block_t") > next_power_of_2(problem.seq_len):
            return f"block_t = {schedule['block_t']} is more than the {problem.seq_len} tokens there are"
        return None
    if schedule.number("tile_rows") < problem.group:
        return f"tile_rows = {schedule['tile_rows']} is less than the {problem.group} rows of one token"
    if schedule.number("tile_rows") > schedule.number("super_tile") * problem.group:
        return f"tile_rows = {schedule['tile_rows']} is more than the rows of a super-tile"
    return _why_not_super_tile(problem, schedule, SMALLEST_SUPER_TILE)


def why_not_cpp(problem: Problem, schedule: Schedule, target: Target) -> str | None:
    """The first reason against a schedule of the C++ family that goes chunk by chunk."""
    sizes = [problem.chunk_size, problem.value_dim]
    if problem.op == "hsa_backward":
        sizes.append(problem.head_dim)
    reason = why_not_rows(schedule, target, sizes)
    return reason or _why_not_super_tile(problem, schedule, SMALLEST_CPP_SUPER_TILE)


def why_not_rows(schedule: Schedule, target: Target, sizes: Sequence[int]) -> str | None:
    """Whether a C++ register tile of `rows` rows of so many floats is too large."""
    lanes, registers = _VECTORS.get(target.arch, _OTHER_VECTORS)
    needed = schedule.number("rows") * max(vector_columns(size, lanes) for size in sizes)
    if needed > registers:
        return f"rows = {schedule['rows']} fill {needed} vector registers, {target.arch} has {registers} for them"
    return None


def _why_not_super_tile(problem: Problem, schedule: Schedule, smallest: int) -> str | None:
    tokens = max(smallest, next_power_of_2(problem.seq_len))
    if schedule.number("super_tile") > tokens:
        return f"super_tile = {schedule['super_tile']} is more than the {problem.seq_len} tokens there are"
    return None


def why_not_triton(problem: Problem, schedule: Schedule, target: Target) -> str | None:
    """The first reason against a schedule of the Triton family."""
    if problem.dtype == "float64":
        return "dtype = 'float64' has no matrix instruction that Triton uses; use the CPU"
    if reason := _why_not_reduction(problem, schedule):
        return reason
    for knob in ("num_warps", "chunk_warps"):
        if target.kind == "hip" and knob in schedule and schedule.number(knob) > MAX_HIP_WARPS:
            return f"{knob} = {schedule[knob]} leaves a wavefront too few registers, at most {MAX_HIP_WARPS}"
    for knob in ("block_t", "block_m"):
        if knob not in schedule:
            continue
        rows = tile_rows(problem, schedule.number(knob))
        if rows < _MIN_TRITON_ROWS or (rows > _MAX_TRITON_ROWS and schedule[knob] != 1):
            allowed = f"{_MIN_TRITON_ROWS} … {_MAX_TRITON_ROWS}"
            return f"{knob} = {schedule[knob]} makes tiles of {rows} rows, allowed are {allowed}"
    needed = least_shared_memory(problem, schedule, target)
    if needed > target.shared_memory:
        return f"it needs at least {needed} bytes of shared memory, {target.name} has {target.shared_memory}"
    return None


def _why_not_reduction(problem: Problem, schedule: Schedule) -> str | None:
    """The first reason against how a chunk-stationary Triton schedule adds up parts."""
    if schedule.dataflow != "chunk":
        return None
    knob = "dq" if problem.op == "hsa_backward" else "reduce"
    if problem.deterministic and schedule[knob] == "atomic":
        return f"{knob} = 'atomic' adds in any order; a deterministic schedule is asked for"
    if problem.deterministic and problem.op == "hsa_backward" and schedule["segment"] != 0:
        return f"segment = {schedule['segment']} splits lists, whose parts add in any order; deterministic takes 0"
    if schedule[knob] == "slots16" and problem.itemsize != 2:
        return f"{knob} = 'slots16' keeps parts in the input's dtype, which is {problem.dtype}; use slots"
    if schedule["super_tile"] and schedule.number("super_tile") >= next_power_of_2(problem.seq_len):
        return f"super_tile = {schedule['super_tile']} is no less than the {problem.seq_len} tokens there are; use 0"
    return None


def tile_rows(problem: Problem, tokens: int) -> int:
    """Rows of a Triton tile of so many tokens or list entries: each is a group of heads, padded."""
    return tokens * next_power_of_2(problem.group)


def least_shared_memory(problem: Problem, schedule: Schedule, target: Target) -> int:
    """A lower bound of the bytes that any kernel of a Triton schedule needs; below it, compiling is in vain.

    Seen to hold on 15 shapes and four targets with Triton 3.7.1; what the compiler adds is its own business.
    """
    needed = 0
    if schedule.dataflow in ("token", "union"):
        tokens = schedule.number("block_m") if schedule.dataflow == "union" else 1
        needed = token_shared_memory(problem, target, tokens, schedule.number("num_stages"))[0]
    if "block_t" in schedule:
        stages = schedule.number("chunk_stages" if "chunk_stages" in schedule else "num_stages")
        rows = tile_rows(problem, schedule.number("block_t"))
        atomics = schedule.dataflow == "chunk"
        needed = max(needed, chunk_shared_memory(problem, target, rows, stages, atomics)[0])
    return needed


def token_shared_memory(problem: Problem, target: Target, tokens: int, stages: int) -> tuple[int, int]:
    """Least and most bytes of a Triton kernel that owns so many tokens, by the buffers of its software pipeline."""
    C, D, Dv = _padded_dims(problem)
    rows = max(_MIN_TRITON_ROWS, tile_rows(problem, tokens))
    tile = C * (D + Dv) * problem.itemsize
    row_bytes = rows * (D + (Dv if problem.op == "hsa_backward" else 0)) * problem.itemsize
    least = max(1, stages - 2) * tile if stages > 1 else C * max(D, Dv) * problem.itemsize
    extra = row_bytes + 2 * rows * C * problem.itemsize + 512
    if target.kind == "hip":
        return least, least + extra
    return least, _buffers(problem, target, rows, stages) * tile + extra


def chunk_shared_memory(problem: Problem, target: Target, rows: int, stages: int, atomics: bool) -> tuple[int, int]:
    """Least and most bytes of a chunk-stationary Triton kernel, by the buffers of its software pipeline."""
    C, D, Dv = _padded_dims(problem)
    size, backward = problem.itemsize, problem.op == "hsa_backward"
    if target.kind == "hip":
        if backward:
            return 0, max(C, rows) * max(D, Dv) * (4 if atomics else size)
        return 0, rows * D * size + 4 * rows * Dv + C * max(D, Dv) * size
    row_bytes = rows * (D + (Dv if backward else 0)) * size
    chunk_bytes = C * (D + Dv) * size
    most = chunk_bytes + _buffers(problem, target, rows, stages) * row_bytes + 512
    most += (2 if backward else 1) * rows * C * size + (C * D * size if backward else 0)
    if atomics:
        most += 4 * rows * (D if backward else Dv)
    return chunk_bytes + max(1, stages - 2) * row_bytes, most


def _buffers(problem: Problem, target: Target, rows: int, stages: int) -> int:
    """Copies of a streamed tile that the pipeliner keeps; asynchronous matrix instructions hold one longer."""
    if stages == 1:
        return 1
    asynchronous = rows >= 64 and target.arch != "sm_80" and problem.itemsize == 2
    return max(2, stages - 1) if asynchronous else max(1, stages - 2)


def _padded_dims(problem: Problem) -> tuple[int, int, int]:
    sizes = (problem.chunk_size, problem.head_dim, problem.value_dim)
    C, D, Dv = (max(16, next_power_of_2(size)) for size in sizes)
    return C, D, Dv
