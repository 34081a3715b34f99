"""The schedules of `hsa_decode`: knobs, what a problem can use of them, and what runs untuned."""

from collections.abc import Iterator, Mapping

from hsa_compile.problem import Problem, next_power_of_2
from hsa_compile.schedules.limits import (
    MAX_GATHER_BYTES,
    MAX_HIP_WARPS,
    gathered_bytes,
    token_shared_memory,
    why_not_rows,
)
from hsa_compile.schedules.schedule import Knob, Schedule
from hsa_compile.target import Target

Choices = Mapping[str, Mapping[str, tuple[Knob, ...]]]

SHARED_BYTES = 1 << 20  # of keys and values that a CPU reads: below, a second thread takes longer to wake than it saves
_SPLITS = (1, 2, 4, 8, 16)

# (op, template family) → dataflow → knob → what it may be
DECODE_CHOICES: Mapping[tuple[str, str], Choices] = {
    # parts of a token's slots, which cores share; rows of a register tile: keys of its logits, heads of its output
    ("hsa_decode", "cpp"): {"split": {"split": _SPLITS, "rows": (1, 2, 3, 4, 6, 8, 12, 16, 24)}},
    # picks of one batched product
    ("hsa_decode", "torch"): {"split": {"block": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)}},
    # programs that share the picks of one token and kv head
    ("hsa_decode", "triton"): {
        "split": {"split": _SPLITS, "num_warps": (1, 2, 4, 8), "num_stages": (1, 2, 3, 4)},
    },
}

_BLOCK_BYTES = 1 << 22  # gathered by one batched product: fewer cost more calls, more leave the cache


def why_not_decode(problem: Problem, schedule: Schedule, target: Target) -> str | None:
    """The first reason against a schedule of this op."""
    if "split" in schedule and schedule.number("split") > next_power_of_2(problem.top_k):
        return f"split = {schedule['split']} is more than the {problem.top_k} slots there are"
    if "rows" in schedule:
        return why_not_rows(schedule, target, [problem.group, problem.value_dim])
    if target.kind == "cpu":
        gathered = schedule.number("block") * _pick_bytes(problem)
        if schedule["block"] != 1 and gathered > MAX_GATHER_BYTES:
            return f"block = {schedule['block']} gathers {gathered} bytes, at most {MAX_GATHER_BYTES}"
        return None
    if problem.dtype == "float64":
        return "dtype = 'float64' has no matrix instruction that Triton uses; use the CPU"
    if target.kind == "hip" and schedule.number("num_warps") > MAX_HIP_WARPS:
        return f"num_warps = {schedule['num_warps']} leaves a wavefront too few registers, at most {MAX_HIP_WARPS}"
    # Looking pages up takes stages of the pipeline too: of keys and values there may be but one copy.
    needed = token_shared_memory(problem, target, 1, min(schedule.number("num_stages"), 2))[0]
    if needed > target.shared_memory:
        return f"it needs at least {needed} bytes of shared memory, {target.name} has {target.shared_memory}"
    return None


def fit_decode(problem: Problem, schedule: Schedule) -> Schedule:
    """A schedule tuned for more slots, with no more programs to a token than this problem has slots."""
    if "split" not in schedule:
        return schedule
    split = min(schedule.number("split"), next_power_of_2(problem.top_k))
    return Schedule.from_dict({**schedule, "split": split})


def decode_preferences(problem: Problem, target: Target, template: str) -> list[Schedule]:
    """Schedules to run untuned, the best first."""
    if template == "torch":
        blocks = DECODE_CHOICES["hsa_decode", "torch"]["split"]["block"]
        fitting = [block for block in blocks if block == 1 or int(block) * _pick_bytes(problem) <= _BLOCK_BYTES]
        return [Schedule.of("split", block=fitting[-1])]
    if template == "cpp":
        return list(_cpp_preferences(problem, target))
    return list(_triton_preferences(problem, target))


def _cpp_preferences(problem: Problem, target: Target) -> Iterator[Schedule]:
    """One part a core where tokens are fewer than cores and read enough to pay for waking threads."""
    tokens = problem.batch * problem.seq_len * problem.num_kv_heads
    split = 1
    if tokens * gathered_bytes(problem) >= SHARED_BYTES:
        split = min(next_power_of_2(-(-target.num_cores // tokens)), next_power_of_2(problem.top_k), _SPLITS[-1])
    for rows in (24, 16, 12, 8, 6, 4, 3, 2, 1):
        yield Schedule.of("split", split=split, rows=rows)


def _triton_preferences(problem: Problem, target: Target) -> Iterator[Schedule]:
    """As many programs as the device has multiprocessors, if the slots suffice; then the longest pipeline that fits."""
    tokens = problem.batch * problem.seq_len * problem.num_kv_heads
    wanted = next_power_of_2(-(-target.num_cores // tokens))
    split = min(wanted, next_power_of_2(problem.top_k), _SPLITS[-1])
    group = next_power_of_2(problem.group)
    num_warps = 8 if target.kind == "cuda" and group >= 128 else 4
    # A stage more than a program has chunks would never be filled.
    steps = -(-problem.top_k // split)
    most = 1 if problem.itemsize == 4 and target.kind == "hip" else 2 if target.kind == "hip" else 3
    # Seen on sm_90 with chunks of 64 keys, D 64: a third stage of single heads spills two registers.
    if problem.paged and problem.group == 1:
        most = min(most, 2)
    for stages in range(min(most, max(1, steps)), 0, -1):
        if stages == 1 or token_shared_memory(problem, target, 1, stages)[1] <= target.shared_memory:
            yield Schedule.of("split", split=split, num_warps=num_warps, num_stages=stages)


def _pick_bytes(problem: Problem) -> int:
    """Bytes that one pick gathers, in the dtype that is computed in."""
    return gathered_bytes(problem) // problem.top_k
