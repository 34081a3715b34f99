"""The limits that a device sets a kernel: a CPU's vector registers, a Triton program's rows and shared memory."""

from collections.abc import Sequence

from hsa_compile.problem import Problem, next_power_of_2
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import Target

MAX_GATHER_BYTES = 1 << 28  # the most that one batched product in PyTorch may gather
MIN_ROWS = 16  # the fewest rows that a matrix instruction takes
FULL_ROWS = 64  # the fewest that the newer matrix instructions take
MAX_HIP_WARPS = 4  # with more, a wavefront has half of the registers, and most kernels spill
NO_FLOAT64 = "dtype = 'float64' has no matrix instruction that Triton uses; use the CPU"

_MOST_PICKS = (1 << 31) - 1  # in a super-tile, whose picks kernels number in 32 bits
_MAX_SLOT_BYTES = 1 << 34  # a fifth of the memory of an 80 GB GPU
_MAX_PANEL = 4  # the most vectors in a row of a C++ register tile

# The floats that a vector register holds, and the registers that a tile may fill: the rest hold a row and a broadcast.
_VECTORS = {"avx512": (16, 28), "avx2": (8, 12)}
_OTHER_VECTORS = (4, 24)  # Arm has 32 registers


def vector_lanes(arch: str) -> int:
    """Returns how many floats a vector register of a CPU holds."""
    return _VECTORS.get(arch, _OTHER_VECTORS)[0]


def vector_columns(size: int, lanes: int) -> int:
    """Returns the vectors in a row of a register tile that covers `size` floats in panels of equal width, at most 4."""
    vectors = -(-size // lanes)
    panels = -(-vectors // _MAX_PANEL)
    return -(-vectors // panels)


def gathered_bytes(problem: Problem) -> int:
    """Returns the bytes of keys and values that the PyTorch token dataflow gathers for one token."""
    return problem.top_k * problem.chunk_size * (problem.head_dim + problem.value_dim) * max(problem.itemsize, 4)


def why_not_rows(schedule: Schedule, target: Target, sizes: Sequence[int]) -> str | None:
    """Returns why a C++ register tile of `rows` rows, each of one of these sizes in floats, is too large, or None."""
    lanes, registers = _VECTORS.get(target.arch, _OTHER_VECTORS)
    needed = schedule.number("rows") * max(vector_columns(size, lanes) for size in sizes)
    if needed > registers:
        return f"rows = {schedule['rows']} fill {needed} vector registers, {target.arch} has {registers} for them"
    return None


def why_not_super_tile(problem: Problem, schedule: Schedule, smallest: int) -> str | None:
    """Returns why a super-tile has too many tokens for the problem, or None; the smallest choice is always allowed."""
    tokens = max(smallest, next_power_of_2(problem.seq_len))
    if schedule.number("super_tile") > tokens:
        return f"super_tile = {schedule['super_tile']} is more than the {problem.seq_len} tokens there are"
    if schedule.number("super_tile") * problem.num_heads * problem.top_k > _MOST_PICKS:
        return f"super_tile = {schedule['super_tile']} has more than {_MOST_PICKS} picks, of all heads"
    return None


def why_not_window(problem: Problem, schedule: Schedule) -> str | None:
    """Returns why a Triton schedule may not keep the slots of its window of tokens, or None."""
    window, tokens = schedule.number("window"), problem.batch * problem.seq_len
    if window and window >= next_power_of_2(tokens):
        return f"window = {window} is no less than the {tokens} tokens there are; use 0"
    if window and window < schedule.number("super_tile"):
        return f"window = {window} is less than super_tile = {schedule['super_tile']}"
    return why_not_slot_memory(problem, schedule)


def why_not_slot_memory(problem: Problem, schedule: Schedule) -> str | None:
    """Returns why a Triton schedule may not keep a part for each pick of so many tokens at once, or None."""
    tokens = problem.batch * problem.seq_len
    if schedule.dataflow == "chunk" and schedule["super_tile"]:
        tokens = schedule.number("super_tile")
    if schedule.get("window"):
        tokens = schedule.number("window")
    width = problem.head_dim if problem.op == "hsa_backward" else problem.value_dim
    itemsize = 4 if schedule.dataflow == "chunk" and schedule["reduce"] == "slots" else problem.itemsize
    needed = tokens * problem.num_heads * problem.top_k * width * itemsize
    if needed > _MAX_SLOT_BYTES:
        return f"slots of {tokens} tokens take {needed} bytes, at most {_MAX_SLOT_BYTES}"
    return None


def why_not_warps(schedule: Schedule, target: Target) -> str | None:
    """Returns why a Triton program has more wavefronts than an AMD GPU has registers for, or None."""
    for knob in ("num_warps", "chunk_warps"):
        if target.kind == "hip" and knob in schedule and schedule.number(knob) > MAX_HIP_WARPS:
            return f"{knob} = {schedule[knob]} leaves a wavefront too few registers, at most {MAX_HIP_WARPS}"
    return None


def why_not_shared_memory(needed: int, target: Target) -> str | None:
    """Returns why a Triton program that needs so many bytes of shared memory does not fit the target, or None."""
    if needed > target.shared_memory:
        return f"it needs at least {needed} bytes of shared memory, {target.name} has {target.shared_memory}"
    return None


def tile_rows(problem: Problem, tokens: int) -> int:
    """Returns the rows of a Triton tile of so many tokens or list entries: each is a group of heads, padded."""
    return tokens * next_power_of_2(problem.group)


def fused_rows(problem: Problem, schedule: Schedule) -> int:
    """Returns the rows of one step of a fused Triton kernel; those of `FULL_ROWS` for each four warps backward.

    On an H100 eight warps with 128 rows make gradients 1.06 to 1.2 times as fast as four with 64, whose registers run
    short; the output they make more slowly.
    """
    warps = schedule.number("num_warps") if problem.op == "hsa_backward" else 4
    return FULL_ROWS * warps // 4


def fused_step(problem: Problem, schedule: Schedule) -> int:
    """Returns the list entries of one step of a fused Triton kernel: as many as fill its rows."""
    return max(1, fused_rows(problem, schedule) // next_power_of_2(problem.group))


def why_not_pipelined(problem: Problem, target: Target, rows: int, stages: int) -> str | None:
    """Returns why a loop that makes dk and dv together may not overlap its steps, or None.

    With rows for Hopper's matrix instructions and a chunk for Ampere's, or the other way around, Triton 3.6 takes dk
    from the wrong step: on an H100 all of 13 such loops were wrong, and all of 31 others were right.
    """
    chunk = _padded_dims(problem)[0]
    mixed = (rows >= FULL_ROWS) != (chunk >= FULL_ROWS)
    if target.arch not in ("sm_90", "sm_100") or problem.itemsize != 2 or stages == 1 or not mixed:
        return None
    return (
        f"tiles of {rows} rows and chunks of {chunk} mix two kinds of matrix instructions, which gives a wrong dk "
        "where steps overlap; it takes one stage"
    )


def token_shared_memory(problem: Problem, target: Target, tokens: int, stages: int) -> tuple[int, int]:
    """Returns the least and most shared memory of a Triton kernel that owns so many tokens, by its pipeline."""
    C, D, Dv = _padded_dims(problem)
    rows = max(MIN_ROWS, tile_rows(problem, tokens))
    tile = C * (D + Dv) * problem.itemsize
    row_bytes = rows * (D + (Dv if problem.op == "hsa_backward" else 0)) * problem.itemsize
    # Keys may move on to registers before the next ones arrive, values hardly.
    least = max(1, stages - 1 - (target.arch == "sm_80")) * tile if stages > 1 else C * max(D, Dv) * problem.itemsize
    if _runs_ahead(problem, target, rows, stages):
        least = stages * tile + row_bytes + rows * C * problem.itemsize
    extra = row_bytes + 2 * rows * C * problem.itemsize + 512
    if target.kind == "hip":
        return least, least + extra
    return least, _buffers(target, stages) * tile + extra


def chunk_shared_memory(problem: Problem, target: Target, rows: int, stages: int, atomics: bool) -> tuple[int, int]:
    """Returns the least and most shared memory of a chunk-stationary Triton kernel, by its pipeline."""
    C, D, Dv = _padded_dims(problem)
    size, backward = problem.itemsize, problem.op == "hsa_backward"
    if target.kind == "hip":
        if backward:
            return 0, max(C, rows) * max(D, Dv) * (4 if atomics else size)
        return 0, rows * D * size + 4 * rows * Dv + C * max(D, Dv) * size
    row_bytes = rows * (D + (Dv if backward else 0)) * size
    chunk_bytes = C * (D + Dv) * size
    most = chunk_bytes + _buffers(target, stages) * row_bytes + 512
    most += (2 if backward else 1) * rows * C * size + (C * D * size if backward else 0)
    if atomics:
        most += 4 * rows * (D if backward else Dv)
    if _runs_ahead(problem, target, rows, stages):
        return chunk_bytes + stages * row_bytes + (rows if backward or size == 4 else FULL_ROWS) * C * size, most
    # Fewer rows than the newer matrix instructions take keep the chunk in registers.
    least = chunk_bytes if rows >= 64 and size == 2 else 0
    return least + max(1, stages - 1 - (target.arch == "sm_80")) * row_bytes, most


def _runs_ahead(problem: Problem, target: Target, rows: int, stages: int) -> bool:
    """Whether a loop keeps a copy for each stage, as those on Hopper do whose products read shared memory alone."""
    wide = rows >= FULL_ROWS and _padded_dims(problem)[0] >= FULL_ROWS
    return target.arch == "sm_90" and stages > 1 and (wide or problem.itemsize == 4)


def _buffers(target: Target, stages: int) -> int:
    """Returns how many copies of a streamed tile the pipeliner keeps; one more where copies run ahead of products."""
    return max(1, stages - 1) if target.arch == "sm_80" else stages


def _padded_dims(problem: Problem) -> tuple[int, int, int]:
    sizes = (problem.chunk_size, problem.head_dim, problem.value_dim)
    C, D, Dv = (max(16, next_power_of_2(size)) for size in sizes)
    return C, D, Dv
