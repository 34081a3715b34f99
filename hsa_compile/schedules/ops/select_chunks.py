"""The schedules of `select_chunks` and its backward: knobs, constraints, defaults and cost on each backend."""

import math
from dataclasses import replace

from hsa_compile.problem import Problem, next_power_of_2
from hsa_compile.schedules.ops.backend import OpBackend, Work, keep
from hsa_compile.schedules.ops.limits import NO_FLOAT64, why_not_warps
from hsa_compile.schedules.schedule import Knob, Schedule
from hsa_compile.target import Target

_TRITON_STREAM = {
    "block_tokens": (16, 32, 64, 128),  # tokens of a program
    "block_n": (16, 32, 64, 128, 256),  # landmarks of a step
    "selection": ("insert", "merge"),
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3),
}
_TRITON_TOKEN = {"block_tokens": (1, 2, 4, 8, 16), "num_warps": (1, 2, 4, 8)}

# A Triton program that holds more of these elements spills registers on every GPU.
_MAX_SCORES = 64 * 128
_MAX_KEPT = 64 * 64
_MAX_GATHERED_ROWS = 256
_FEW_PROGRAMS = 2  # with fewer programs for each core, splitting the landmarks pays


def _why_not(problem: Problem, schedule: Schedule, target: Target) -> str | None:
    if problem.dtype == "float64":
        return NO_FLOAT64
    if reason := why_not_warps(schedule, target):
        return reason
    tokens, kept = schedule.number("block_tokens"), next_power_of_2(problem.top_k)
    if problem.op == "select_chunks_backward":
        if problem.deterministic and schedule.dataflow == "token":
            return "dataflow = 'token' adds with atomics; a deterministic schedule is asked for"
        if tokens > 1 and tokens * kept > _MAX_GATHERED_ROWS:
            return f"block_tokens = {tokens} gathers {tokens * kept} landmarks, at most {_MAX_GATHERED_ROWS}"
        return None
    landmarks = schedule.number("block_n")
    chunks = landmarks // problem.landmarks_per_chunk
    if schedule["selection"] == "merge" and chunks < max(4, kept):
        return f"block_n = {landmarks} holds {chunks} chunks, fewer than the slots that a merge compares them with"
    if tokens > 16 and tokens * kept > _MAX_KEPT:
        return f"block_tokens = {tokens} keeps {tokens * kept} picks in registers, at most {_MAX_KEPT}"
    if tokens * landmarks > _MAX_SCORES:
        return (
            f"block_tokens = {tokens} and block_n = {landmarks} make {tokens * landmarks} scores, at most {_MAX_SCORES}"
        )
    return None


def _triton_forward(problem: Problem, target: Target) -> list[Schedule]:
    """Takes the largest tiles that compile without spills; if they are too few for the device, splits the landmarks."""
    kept, sliced = next_power_of_2(problem.top_k), problem.head_dim > 128
    wide, cuda = problem.itemsize == 4, target.kind == "cuda"
    if problem.seq_len <= 16 or kept > 32 or (problem.noise and sliced):
        block_tokens = 16
    else:
        block_tokens = 64 if cuda and not wide and not problem.noise else 32
    block_n = 64 if not wide and not problem.noise and block_tokens > 16 else 32
    one_stage = (wide and block_tokens == 32) or (kept > 64 and sliced)
    knobs: dict[str, Knob] = {
        "block_tokens": block_tokens,
        "block_n": block_n,
        "selection": "insert",
        "num_warps": 8 if kept > 64 and cuda and not sliced else 4,
        "num_stages": 1 if one_stage else 2,
    }
    programs = problem.batch * problem.num_kv_heads * -(-problem.seq_len // block_tokens)
    tiles = -(-problem.num_landmarks // block_n)
    splits = min(tiles, _FEW_PROGRAMS * target.num_cores // programs, 64)
    stream = Schedule.of("stream", **knobs)
    if splits < 2:
        return [stream]
    return [Schedule.of("split", **knobs, num_splits=1 << (splits.bit_length() - 1)), stream]


def _triton_backward(problem: Problem, target: Target) -> list[Schedule]:
    """Goes landmark by landmark, which moves fewer bytes than atomics and gives the same bits every time."""
    kept = next_power_of_2(problem.top_k)
    block_tokens = max(1, min(16, 64 // kept))
    return [Schedule.of("chunk", block_tokens=block_tokens, num_warps=4, chunk_t=16, chunk_warps=4)]


def _work(problem: Problem, schedule: Schedule) -> Work:
    """Counts the scores of all visible landmarks, read once a block of tokens; backward, K landmarks a token."""
    tokens = problem.batch * problem.seq_len * problem.num_kv_heads
    row = problem.head_dim * problem.itemsize
    landmarks = problem.batch * problem.num_kv_heads * problem.num_landmarks
    results = tokens * problem.top_k * 8
    if problem.op == "select_chunks_backward":
        flops = 6.0 * tokens * problem.top_k * problem.head_dim  # the score again, and both gradients
        memory = 2 * (tokens + landmarks) * row + results
        return Work(flops=flops, memory_bytes=memory, cache_bytes=memory + 2 * tokens * problem.top_k * row)
    visible = max(0.5, 1 - problem.seq_len / (2 * problem.kv_len)) * problem.num_landmarks
    block = schedule.number("block_tokens") if "block_tokens" in schedule else 1
    memory = (tokens + landmarks) * row + results
    return Work(
        flops=2.0 * tokens * visible * problem.head_dim,
        memory_bytes=memory,
        cache_bytes=memory + tokens / block * visible * row,
    )


def _triton_work(problem: Problem, schedule: Schedule) -> Work:
    """Counts what the kernels read and write again: rows of parts, of slices and of picks, and the picks themselves."""
    work, backward = _work(problem, schedule), problem.op == "select_chunks_backward"
    tokens = problem.batch * problem.seq_len * problem.num_kv_heads
    own, gathered = tokens * problem.head_dim * problem.itemsize, tokens * problem.top_k
    rows = gathered * problem.head_dim
    if backward and schedule.dataflow == "token":  # the query again, and additions in the cache: read, added, written
        return replace(work, cache_bytes=gathered * 8 + 3 * own + 2 * rows * problem.itemsize + 3 * rows * 4)
    if backward:  # queries by landmark, with the places and gradients of their scores
        landmarks = work.memory_bytes / 2 - gathered * 4 - own
        return replace(work, cache_bytes=gathered * 24 + 2 * own + 3 * rows * problem.itemsize + landmarks)
    splits = schedule.number("num_splits") if schedule.dataflow == "split" else 1
    visible = work.flops / (2.0 * tokens * problem.head_dim)
    passes = splits
    if problem.head_dim > (128 if problem.itemsize == 2 else 64):  # in slices, so again with each step
        passes = max(splits, math.ceil(visible / schedule.number("block_n")))
    landmark_bytes = visible * own / schedule.number("block_tokens")
    parts = 0 if splits == 1 else 2 * gathered * 8 * splits
    return replace(work, cache_bytes=gathered * 8 + passes * own + landmark_bytes + parts)


def _anything_goes(problem: Problem, schedule: Schedule, target: Target) -> str | None:
    return None  # on a CPU each schedule runs every problem


TORCH = OpBackend(
    name="torch",
    choices={"stream": {"block_tokens": (16, 64, 256, 1024), "block_n": (64, 256, 1024, 4096)}},
    why_not=_anything_goes,
    fit=keep,
    defaults=lambda problem, target: [Schedule.of("stream", block_tokens=256, block_n=1024)],
    work=_work,
)
TORCH_BACKWARD = replace(
    TORCH,
    choices={"token": {"block_tokens": (16, 64, 256, 1024)}},
    defaults=lambda problem, target: [Schedule.of("token", block_tokens=256)],
)
CPP = OpBackend(
    name="cpp",
    choices={
        "stream": {"super_tile": (64, 256, 512, 1024, 4096), "block_n": (64, 128, 256, 512), "rows": (2, 3, 4, 6)}
    },
    why_not=_anything_goes,
    fit=keep,
    defaults=lambda problem, target: [Schedule.of("stream", super_tile=512, block_n=128, rows=6)],
    work=_work,
)
CPP_BACKWARD = replace(
    CPP,
    choices={"token": {"super_tile": (64, 1024, 4096)}},
    defaults=lambda problem, target: [Schedule.of("token", super_tile=1024)],
)
TRITON = OpBackend(
    name="triton",
    choices={"stream": _TRITON_STREAM, "split": {**_TRITON_STREAM, "num_splits": (2, 4, 8, 16, 32, 64)}},
    why_not=_why_not,
    fit=keep,
    defaults=_triton_forward,
    work=_triton_work,
)
TRITON_BACKWARD = replace(
    TRITON,
    choices={
        "token": _TRITON_TOKEN,
        "chunk": {**_TRITON_TOKEN, "chunk_t": (8, 16, 32, 64), "chunk_warps": (1, 2, 4)},
    },
    defaults=_triton_backward,
)
