"""The schedules of `hsa_decode`: knobs, constraints, defaults and cost on each backend."""

from collections.abc import Iterator
from dataclasses import replace

from hsa_compile.problem import Problem, next_power_of_2
from hsa_compile.schedules.ops.backend import OpBackend, Work, keep
from hsa_compile.schedules.ops.limits import (
    MAX_GATHER_BYTES,
    NO_FLOAT64,
    gathered_bytes,
    token_shared_memory,
    why_not_rows,
    why_not_shared_memory,
    why_not_warps,
)
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import Target

# If a CPU reads fewer bytes of keys and values, a second thread takes longer to wake than it saves.
SHARED_BYTES = 1 << 20
_SPLITS = (1, 2, 4, 8, 16)
_BLOCKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_BLOCK_BYTES = 1 << 22  # what one batched product gathers: less would take more calls, more would leave the cache


def _why_not_torch(problem: Problem, schedule: Schedule, target: Target) -> str | None:
    gathered = schedule.number("block") * _pick_bytes(problem)
    if schedule["block"] != 1 and gathered > MAX_GATHER_BYTES:
        return f"block = {schedule['block']} gathers {gathered} bytes, at most {MAX_GATHER_BYTES}"
    return None


def _why_not_cpp(problem: Problem, schedule: Schedule, target: Target) -> str | None:
    return _why_not_split(problem, schedule) or why_not_rows(schedule, target, [problem.group, problem.value_dim])


def _why_not_triton(problem: Problem, schedule: Schedule, target: Target) -> str | None:
    if reason := _why_not_split(problem, schedule):
        return reason
    if problem.dtype == "float64":
        return NO_FLOAT64
    if reason := why_not_warps(schedule, target):
        return reason
    # Looking pages up takes stages of the pipeline too, so there may be only one copy of keys and values.
    needed = token_shared_memory(problem, target, 1, min(schedule.number("num_stages"), 2))[0]
    return why_not_shared_memory(needed, target)


def _why_not_split(problem: Problem, schedule: Schedule) -> str | None:
    if schedule.number("num_splits") > next_power_of_2(problem.top_k):
        return f"num_splits = {schedule['num_splits']} is more than the {problem.top_k} slots there are"
    return None


def _fit_split(problem: Problem, schedule: Schedule) -> Schedule:
    """Cuts the parts of a token to the slots that this problem has."""
    split = min(schedule.number("num_splits"), next_power_of_2(problem.top_k))
    return Schedule.from_dict({**schedule, "num_splits": split})


def _torch_defaults(problem: Problem, target: Target) -> list[Schedule]:
    fitting = [block for block in _BLOCKS if block == 1 or block * _pick_bytes(problem) <= _BLOCK_BYTES]
    return [Schedule.of("split", block=fitting[-1])]


def _cpp_defaults(problem: Problem, target: Target) -> Iterator[Schedule]:
    """Gives each core one part where tokens are fewer than cores and read enough to pay for waking threads."""
    tokens = problem.batch * problem.seq_len * problem.num_kv_heads
    split = 1
    if tokens * gathered_bytes(problem) >= SHARED_BYTES:
        split = min(next_power_of_2(-(-target.num_cores // tokens)), next_power_of_2(problem.top_k), _SPLITS[-1])
    for rows in (24, 16, 12, 8, 6, 4, 3, 2, 1):
        yield Schedule.of("split", num_splits=split, rows=rows)


def _triton_defaults(problem: Problem, target: Target) -> Iterator[Schedule]:
    """Takes as many programs as there are multiprocessors, if the slots suffice, and the longest pipeline that fits."""
    tokens = problem.batch * problem.seq_len * problem.num_kv_heads
    wanted = next_power_of_2(-(-target.num_cores // tokens))
    split = min(wanted, next_power_of_2(problem.top_k), _SPLITS[-1])
    group = next_power_of_2(problem.group)
    num_warps = 8 if target.kind == "cuda" and group >= 128 else 4
    # A stage more than a program has chunks would never be filled.
    steps = -(-problem.top_k // split)
    most = 1 if problem.itemsize == 4 and target.kind == "hip" else 2 if target.kind == "hip" else 3
    # On sm_90, with chunks of 64 keys and D 64, a third stage of single heads was seen to spill two registers.
    if problem.paged and problem.group == 1:
        most = min(most, 2)
    for stages in range(min(most, max(1, steps)), 0, -1):
        if stages == 1 or token_shared_memory(problem, target, 1, stages)[1] <= target.shared_memory:
            yield Schedule.of("split", num_splits=split, num_warps=num_warps, num_stages=stages)


def _pick_bytes(problem: Problem) -> int:
    """Returns the bytes that one pick gathers, in the dtype that is computed in."""
    return gathered_bytes(problem) // problem.top_k


def _work(problem: Problem, schedule: Schedule) -> Work:
    """Counts the FLOPs and bytes of the picked chunks alone, each of which is read once."""
    D, Dv, size = problem.head_dim, problem.value_dim, problem.itemsize
    tokens = problem.batch * problem.seq_len
    lists = tokens * problem.num_kv_heads * problem.top_k
    rows = tokens * problem.num_heads * problem.top_k
    moved = tokens * problem.num_heads * (D + Dv) * size + lists * problem.chunk_size * (D + Dv) * size + lists * 8
    return Work(flops=2.0 * rows * problem.chunk_size * (D + Dv), memory_bytes=moved, cache_bytes=moved)


def _triton_work(problem: Problem, schedule: Schedule) -> Work:
    """Adds the parts of the output that split tokens leave in float32, written once and read once."""
    work, splits = _work(problem, schedule), schedule.number("num_splits")
    parts = 0 if splits == 1 else problem.batch * problem.seq_len * problem.num_heads * problem.value_dim * 4 * splits
    return replace(work, memory_bytes=work.memory_bytes + 2 * parts, cache_bytes=work.cache_bytes + 2 * parts)


TORCH = OpBackend(
    name="torch",
    choices={"split": {"block": _BLOCKS}},  # `block` counts the picks of one batched product
    why_not=_why_not_torch,
    fit=keep,
    defaults=_torch_defaults,
    work=_work,
)
CPP = OpBackend(
    name="cpp",
    # `split` is the number of parts, shared by cores, that a token's slots are cut into; `rows` is the rows of a
    # register tile: keys for its logits, heads for its output.
    choices={"split": {"num_splits": _SPLITS, "rows": (1, 2, 3, 4, 6, 8, 12, 16, 24)}},
    why_not=_why_not_cpp,
    fit=_fit_split,
    defaults=lambda problem, target: list(_cpp_defaults(problem, target)),
    work=_work,
)
TRITON = OpBackend(
    name="triton",
    # `split` is how many programs share the picks of one token and kv head.
    choices={"split": {"num_splits": _SPLITS, "num_warps": (1, 2, 4, 8), "num_stages": (1, 2, 3, 4)}},
    why_not=_why_not_triton,
    fit=_fit_split,
    defaults=lambda problem, target: list(_triton_defaults(problem, target)),
    work=_triton_work,
)
