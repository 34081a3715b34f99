"""The schedules of `select_chunks` and its backward: knobs, what a problem can use of them, and what runs untuned."""

from collections.abc import Mapping

from hsa_compile.problem import Problem, next_power_of_2
from hsa_compile.schedules.schedule import Knob, Schedule
from hsa_compile.target import Target

Choices = Mapping[str, Mapping[str, tuple[Knob, ...]]]

_TRITON_STREAM = {
    "block_t": (16, 32, 64, 128),  # tokens of a program
    "block_n": (16, 32, 64, 128, 256),  # landmarks of a step
    "selection": ("insert", "merge"),
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3),
}
_TRITON_TOKEN = {"block_t": (1, 2, 4, 8, 16), "num_warps": (1, 2, 4, 8)}

# (op, template family) → dataflow → knob → what it may be
SELECT_CHOICES: Mapping[tuple[str, str], Choices] = {
    ("select_chunks", "torch"): {"stream": {"block_t": (16, 64, 256, 1024), "block_n": (64, 256, 1024, 4096)}},
    ("select_chunks_backward", "torch"): {"token": {"block_t": (16, 64, 256, 1024)}},
    ("select_chunks", "cpp"): {
        "stream": {"super_tile": (64, 256, 512, 1024, 4096), "block_n": (64, 128, 256, 512), "rows": (2, 3, 4, 6)}
    },
    ("select_chunks_backward", "cpp"): {"token": {"super_tile": (64, 1024, 4096)}},
    ("select_chunks", "triton"): {
        "stream": _TRITON_STREAM,
        "split": {**_TRITON_STREAM, "num_splits": (2, 4, 8, 16, 32, 64)},
    },
    ("select_chunks_backward", "triton"): {
        "token": _TRITON_TOKEN,
        "chunk": {**_TRITON_TOKEN, "chunk_t": (8, 16, 32, 64), "chunk_warps": (1, 2, 4)},
    },
}

# Of a Triton program, in elements: beyond, registers spill on every GPU.
_MAX_SCORES = 64 * 128
_MAX_KEPT = 64 * 64
_MAX_GATHERED_ROWS = 256
_MAX_HIP_WARPS = 4
_FEW_PROGRAMS = 2  # a core, below which splitting the landmarks pays


def why_not_select(problem: Problem, schedule: Schedule, target: Target) -> str | None:
    """The first reason against a schedule of these ops; on a CPU each of them runs all problems."""
    if target.kind == "cpu":
        return None
    if problem.dtype == "float64":
        return "dtype = 'float64' has no matrix instruction that Triton uses; use the CPU"
    for knob in ("num_warps", "chunk_warps"):
        if target.kind == "hip" and knob in schedule and schedule.number(knob) > _MAX_HIP_WARPS:
            return f"{knob} = {schedule[knob]} leaves a wavefront too few registers, at most {_MAX_HIP_WARPS}"
    tokens, kept = schedule.number("block_t"), next_power_of_2(problem.top_k)
    if problem.op == "select_chunks_backward":
        if problem.deterministic and schedule.dataflow == "token":
            return "dataflow = 'token' adds with atomics; a deterministic schedule is asked for"
        if tokens > 1 and tokens * kept > _MAX_GATHERED_ROWS:
            return f"block_t = {tokens} gathers {tokens * kept} landmarks, at most {_MAX_GATHERED_ROWS}"
        return None
    landmarks = schedule.number("block_n")
    if schedule["selection"] == "merge" and landmarks < kept:
        return f"block_n = {landmarks} is less than the {kept} slots that a merge compares it with"
    if tokens > 16 and tokens * kept > _MAX_KEPT:
        return f"block_t = {tokens} keeps {tokens * kept} picks in registers, at most {_MAX_KEPT}"
    if tokens * landmarks > _MAX_SCORES:
        return f"block_t = {tokens} and block_n = {landmarks} make {tokens * landmarks} scores, at most {_MAX_SCORES}"
    return None


def select_preferences(problem: Problem, target: Target, template: str) -> list[Schedule]:
    """Schedules to run untuned, the best first."""
    if problem.op == "select_chunks_backward":
        if template == "triton":
            return _triton_backward(problem)
        return [Schedule.of("token", **({"super_tile": 1024} if template == "cpp" else {"block_t": 256}))]
    if template == "cpp":
        return [Schedule.of("stream", super_tile=512, block_n=128, rows=6)]
    if template == "torch":
        return [Schedule.of("stream", block_t=256, block_n=1024)]
    return _triton_forward(problem, target)


def _triton_forward(problem: Problem, target: Target) -> list[Schedule]:
    """The largest tiles that compile without spills; where they are too few for the device, the landmarks are split."""
    kept, sliced = next_power_of_2(problem.top_k), problem.head_dim > 128
    wide, cuda = problem.itemsize == 4, target.kind == "cuda"
    if problem.seq_len <= 16 or kept > 32 or (problem.noise and sliced):
        block_t = 16
    else:
        block_t = 64 if cuda and not wide and not problem.noise else 32
    block_n = 64 if not wide and not problem.noise and block_t > 16 else 32
    one_stage = (wide and block_t == 32) or (kept > 64 and sliced)
    knobs: dict[str, Knob] = {
        "block_t": block_t,
        "block_n": block_n,
        "selection": "insert",
        "num_warps": 8 if kept > 64 and cuda and not sliced else 4,
        "num_stages": 1 if one_stage else 2,
    }
    programs = problem.batch * problem.num_kv_heads * -(-problem.seq_len // block_t)
    tiles = -(-problem.num_chunks // block_n)
    splits = min(tiles, _FEW_PROGRAMS * target.num_cores // programs, 64)
    stream = Schedule.of("stream", **knobs)
    if splits < 2:
        return [stream]
    return [Schedule.of("split", **knobs, num_splits=1 << (splits.bit_length() - 1)), stream]


def _triton_backward(problem: Problem) -> list[Schedule]:
    """Landmark by landmark: fewer bytes than atomics move, and the same bits every time."""
    kept = next_power_of_2(problem.top_k)
    block_t = max(1, min(16, 64 // kept))
    return [Schedule.of("chunk", block_t=block_t, num_warps=4, chunk_t=16, chunk_warps=4)]
