"""The schedules of `hsa_attention` in Triton, for a GPU: four dataflows forward and as many backward."""

import itertools
from dataclasses import replace

from hsa_compile.problem import Problem, next_power_of_2
from hsa_compile.schedules.ops.backend import Choices, Knobs, OpBackend, largest_choice
from hsa_compile.schedules.ops.hsa_attention.cost import attention_passes, attention_work
from hsa_compile.schedules.ops.limits import (
    MIN_ROWS,
    NO_FLOAT64,
    chunk_shared_memory,
    fused_rows,
    tile_rows,
    token_shared_memory,
    why_not_pipelined,
    why_not_shared_memory,
    why_not_slot_memory,
    why_not_super_tile,
    why_not_warps,
    why_not_window,
)
from hsa_compile.schedules.schedule import Knob, Schedule
from hsa_compile.target import Target

_MAX_ROWS = 256  # in a tile with more, the accumulators spill on every GPU
_SMALL_CHUNK, _FULL_CHUNK = 32 * 128, 64 * 256  # elements of keys and values
_LARGE_GROUP = 64  # heads of a group that fill a matrix instruction without other tokens
_SLOT_BYTES = 1 << 29  # the most that the slots of one super-tile take untuned
_LONG = 8192  # tokens from which on there are enough segments of picks for all multiprocessors
_FEW_PICKS = 16  # picks a chunk below which chunk-stationary tiles are nearly empty

_WARPS, _STAGES = (2, 4, 8), (1, 2, 3, 4)
_CHUNK_WARPS, _CHUNK_STAGES = (4, 8), (1, 2, 3)
_BLOCK_T = (1, 2, 4, 8, 16, 32, 64, 128)
_TOKEN: Knobs = {"num_warps": _WARPS, "num_stages": _STAGES}
_CHUNK: Knobs = {
    "block_entries": _BLOCK_T,
    "segment": (128, 512, 2048),
    "super_tile": (0, 1024, 4096),
    "num_warps": _CHUNK_WARPS,
    "num_stages": _CHUNK_STAGES,
}
# How the parts of one token's output, or dq, come together: added to memory, or summed by a second kernel.
_REDUCTIONS = ("atomic", "slots", "slots16")
_CHUNK_FORWARD: Knobs = {"reduce": _REDUCTIONS, **_CHUNK}
_CHUNK_BACKWARD: Knobs = {"reduce": _REDUCTIONS, **_CHUNK, "segment": (0, *_CHUNK["segment"])}
_UNION: Knobs = {"block_tokens": (1, 2, 4, 8, 16, 32), "num_warps": _CHUNK_WARPS, "num_stages": _CHUNK_STAGES}
# dq and dw token by token or block by block, then dk and dv chunk by chunk
_SECOND_PASS: Knobs = {
    "dk_dv": ("together", "apart"),
    "block_entries": _BLOCK_T[:-1],
    "chunk_warps": _CHUNK_WARPS,
    "chunk_stages": (1, 2),
}

# Chunk by chunk within super-tiles of tokens, all in one launch. Parts are added up by the program that writes the last
# one of a token (`fused`), by a second kernel (`slots`), or in memory (`atomic`).
_FUSED: Knobs = {
    "window": (0, 16384, 65536),
    "super_tile": (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072),
    "segment": (4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096),
    "unroll": (8, 16),
    "discard": (0, 1),  # whether slots that were added up are dropped from the cache, not written back
    "num_warps": _CHUNK_WARPS,
    "num_stages": _CHUNK_STAGES,
}
_FUSED_FORWARD: Knobs = {"reduce": ("fused", "slots"), **_FUSED}
_FUSED_BACKWARD: Knobs = {"reduce": ("fused", "slots", "atomic"), **_FUSED}
# The fastest on an H100 at 64K tokens, by the heads of a group; where one needs too much memory, the next. That of 8
# heads backward was not timed: it lies between those of 4 and 16.
_FASTEST: dict[str, dict[int, tuple[str, ...]]] = {
    "hsa_forward": {
        1: ("fused discard=0 num_stages=2 num_warps=4 reduce=slots segment=1024 super_tile=65536 unroll=8 window={}",),
        2: ("fused discard=0 num_stages=2 num_warps=4 reduce=slots segment=1024 super_tile=32768 unroll=8 window={}",),
        4: ("fused discard=0 num_stages=1 num_warps=4 reduce=slots segment=512 super_tile=16384 unroll=8 window={}",),
        8: ("fused discard=0 num_stages=2 num_warps=4 reduce=slots segment=256 super_tile=8192 unroll=8 window={}",),
    },
    "hsa_backward": {
        1: (
            "chunk block_entries=128 num_stages=2 num_warps=8 reduce=slots16 segment=0 super_tile=0",
            "fused discard=0 num_stages=2 num_warps=8 reduce=slots segment=4096 super_tile=65536 unroll=8 window={}",
        ),
        2: ("fused discard=0 num_stages=2 num_warps=8 reduce=slots segment=1024 super_tile=32768 unroll=8 window={}",),
        4: ("fused discard=0 num_stages=2 num_warps=8 reduce=slots segment=4096 super_tile=65536 unroll=8 window={}",),
        8: ("fused discard=0 num_stages=2 num_warps=8 reduce=slots segment=512 super_tile=8192 unroll=8 window={}",),
        16: ("fused discard=0 num_stages=2 num_warps=8 reduce=slots segment=512 super_tile=8192 unroll=8 window={}",),
    },
}
_MAX_SEGMENT_ROWS = {"hsa_forward": 4096, "hsa_backward": 16384}
_MAX_FUSED_GROUP = 16
_CACHE_LINE = 128  # bytes
_MAX_LIVE_SLOTS = 3 << 25  # bytes of the slots of one super-tile: with more, they leave every cache
_BACKWARD: Choices = {
    "chunk": _CHUNK_BACKWARD,
    "union": {**_UNION, **_SECOND_PASS},
    "token": {**_TOKEN, **_SECOND_PASS},
    "fused": _FUSED_BACKWARD,
}
_FORWARD: Choices = {"chunk": _CHUNK_FORWARD, "union": _UNION, "token": _TOKEN, "fused": _FUSED_FORWARD}


def _why_not(problem: Problem, schedule: Schedule, target: Target) -> str | None:
    if problem.dtype == "float64":
        return NO_FLOAT64
    if reason := _why_not_reduction(problem, schedule):
        return reason
    if reason := why_not_warps(schedule, target):
        return reason
    if schedule.dataflow == "fused" and (reason := _why_not_fused(problem, schedule, target)):
        return reason
    for knob in ("block_entries", "block_tokens"):
        if knob not in schedule:
            continue
        rows = tile_rows(problem, schedule.number(knob))
        if rows < MIN_ROWS or (rows > _MAX_ROWS and schedule[knob] != 1):
            allowed = f"{MIN_ROWS} … {_MAX_ROWS}"
            return f"{knob} = {schedule[knob]} makes tiles of {rows} rows, allowed are {allowed}"
    if problem.op == "hsa_backward" and (reason := _why_not_stages(problem, schedule, target)):
        return reason
    return why_not_shared_memory(least_shared_memory(problem, schedule, target), target)


def _why_not_stages(problem: Problem, schedule: Schedule, target: Target) -> str | None:
    """The first reason against the number of stages of the loop that makes dk and dv."""
    if schedule.dataflow == "fused":
        return why_not_pipelined(problem, target, fused_rows(problem, schedule), schedule.number("num_stages"))
    if schedule.dataflow != "chunk" and schedule["dk_dv"] == "apart":
        return None
    stages = schedule.number("num_stages" if schedule.dataflow == "chunk" else "chunk_stages")
    return why_not_pipelined(problem, target, tile_rows(problem, schedule.number("block_entries")), stages)


def _why_not_reduction(problem: Problem, schedule: Schedule) -> str | None:
    """The first reason against how a chunk-stationary Triton schedule adds up parts."""
    if schedule.dataflow != "chunk":
        return None
    if problem.deterministic and schedule["reduce"] == "atomic":
        return "reduce = 'atomic' adds in any order; a deterministic schedule is asked for"
    if problem.deterministic and problem.op == "hsa_backward" and schedule["segment"] != 0:
        return f"segment = {schedule['segment']} splits lists, whose parts add in any order; deterministic takes 0"
    if schedule["reduce"] == "slots16" and problem.itemsize != 2:
        return f"reduce = 'slots16' keeps parts in the input's dtype, which is {problem.dtype}; use slots"
    if schedule["super_tile"] and schedule.number("super_tile") >= next_power_of_2(problem.seq_len):
        return f"super_tile = {schedule['super_tile']} is no less than the {problem.seq_len} tokens there are; use 0"
    return None if schedule["reduce"] == "atomic" else why_not_slot_memory(problem, schedule)


def _why_not_fused(problem: Problem, schedule: Schedule, target: Target) -> str | None:
    """The first reason against going through all super-tiles in one launch."""
    backward, most_rows = problem.op == "hsa_backward", _MAX_SEGMENT_ROWS[problem.op]
    rows = tile_rows(problem, schedule.number("segment"))
    if target.kind != "cuda":
        return "dataflow = 'fused' counts on one L2 cache, which the dies of this device do not share"
    if next_power_of_2(problem.group) > _MAX_FUSED_GROUP:
        return f"dataflow = 'fused' is for groups of at most {_MAX_FUSED_GROUP} heads, this one has {problem.group}"
    if backward and problem.deterministic:
        return "dataflow = 'fused' adds dk and dv in any order; a deterministic schedule is asked for"
    if not (least_rows := fused_rows(problem, schedule)) <= rows <= most_rows:
        allowed = f"{least_rows} … {most_rows}"
        return f"segment = {schedule['segment']} makes {rows} rows a program, allowed are {allowed}"
    if reason := why_not_super_tile(problem, schedule, int(_FUSED["super_tile"][0])):
        return reason
    if schedule["reduce"] != "atomic" and (reason := why_not_window(problem, schedule)):
        return reason
    if schedule["reduce"] == "fused":
        return _why_not_slots(problem, schedule)
    # Among choices that mean the same, one is enough.
    for knob in ("unroll", "discard"):
        if schedule[knob] != _FUSED[knob][0]:
            return f"{knob} = {schedule[knob]} is for parts that are added up in the same launch; use {_FUSED[knob][0]}"
    if schedule["reduce"] == "atomic" and schedule["window"]:
        return f"window = {schedule['window']} bounds the memory of slots, which reduce = 'atomic' has not; use 0"
    return None


def _why_not_slots(problem: Problem, schedule: Schedule) -> str | None:
    """The first reason against adding parts up in the launch that makes them."""
    width = problem.head_dim if problem.op == "hsa_backward" else problem.value_dim
    token = problem.top_k * problem.group * width * problem.itemsize  # bytes of its slots
    slots = schedule.number("super_tile") * token
    if slots > _MAX_LIVE_SLOTS:
        return f"super_tile = {schedule['super_tile']} has {slots} bytes of slots, a cache keeps {_MAX_LIVE_SLOTS}"
    if schedule.number("unroll") > max(int(_FUSED["unroll"][0]), next_power_of_2(problem.top_k)):
        return f"unroll = {schedule['unroll']} is more than the {problem.top_k} slots there are"
    if schedule["discard"] and token % _CACHE_LINE:
        return f"discard = 1 drops whole lines of {_CACHE_LINE} bytes, the slots of a token have {token}"
    return None


def _fit(problem: Problem, schedule: Schedule) -> Schedule:
    """A fused schedule with no more tokens in a super-tile, or slots read at a time, than the problem has."""
    if schedule.dataflow != "fused":
        return schedule
    cut = {
        knob: largest_choice(_FUSED[knob], schedule.number(knob), next_power_of_2(size))
        for knob, size in (("super_tile", problem.seq_len), ("unroll", problem.top_k))
    }
    if schedule.number("window") >= next_power_of_2(problem.batch * problem.seq_len):
        cut["window"] = 0
    return Schedule.from_dict({**schedule, **cut})


def least_shared_memory(problem: Problem, schedule: Schedule, target: Target) -> int:
    """A lower bound of the bytes that any kernel of a Triton schedule needs; below it, compiling is in vain.

    Seen to hold on 15 shapes and four targets with Triton 3.7.1; what the compiler adds is its own business.
    """
    needed = 0
    if schedule.dataflow in ("token", "union"):
        tokens = schedule.number("block_tokens") if schedule.dataflow == "union" else 1
        needed = token_shared_memory(problem, target, tokens, schedule.number("num_stages"))[0]
    if schedule.dataflow == "fused":
        rows = fused_rows(problem, schedule)
        needed = chunk_shared_memory(problem, target, rows, schedule.number("num_stages"), False)[0]
    if "block_entries" in schedule:
        stages = schedule.number("chunk_stages" if "chunk_stages" in schedule else "num_stages")
        rows = tile_rows(problem, schedule.number("block_entries"))
        atomics = schedule.dataflow == "chunk"
        needed = max(needed, chunk_shared_memory(problem, target, rows, stages, atomics)[0])
    return needed


def _defaults(problem: Problem, target: Target) -> list[Schedule]:
    """A large group fills tiles alone, a middle one together with its neighbours, and a small one only with all tokens
    that picked a chunk. Where bits must repeat, partial sums go through slots."""
    token = _token(problem, target)
    chunk = _chunk(problem, target)
    if problem.group >= _LARGE_GROUP or problem.seq_len < _FEW_PICKS:
        return [token, chunk]
    if problem.itemsize != 2:
        return [chunk, token]
    return [*_fastest(problem, target), *_of_middle_groups(problem, target, token, chunk)]


def _of_middle_groups(problem: Problem, target: Target, token: Schedule, chunk: Schedule) -> list[Schedule]:
    union = _union(problem, target)
    if problem.op == "hsa_backward" and _one_pass_spills(problem, target):
        return [union, token, chunk]
    if next_power_of_2(problem.group) < 16 or (problem.op == "hsa_backward" and not problem.deterministic):
        return [chunk, union, token]
    return [union, chunk, token]


def _fastest(problem: Problem, target: Target) -> list[Schedule]:
    """What was the fastest on an H100 at 64K tokens, for random and for trained picks; nothing for other shapes.

    Beyond 1,024 chunks, as there were, super-tiles grow with their number: else a tile of random picks has few of them.
    """
    texts = _FASTEST[problem.op].get(next_power_of_2(problem.group), ())
    big = problem.chunk_size > 64 or _is_big(problem)
    if target.arch != "sm_90" or problem.deterministic or big or problem.seq_len < _LONG:
        return []
    more_chunks = max(1, next_power_of_2(problem.num_chunks) // 1024)
    found = []
    for text, window in itertools.product(texts, (0, 65536, 16384)):  # the more tokens at a time, the faster
        schedule = Schedule.parse(text.format(window))
        if schedule.dataflow == "fused":
            tokens = schedule.number("super_tile") * more_chunks
            tokens = largest_choice(_FUSED["super_tile"], tokens, window or problem.seq_len)
            schedule = Schedule.from_dict({**schedule, "super_tile": tokens})
        found.append(_fit(problem, schedule))
    return found


def _one_pass_spills(problem: Problem, target: Target) -> bool:
    """Whether dq, dk and dv of one tile at a time are more than the registers of the target hold."""
    if target.arch == "sm_80" and problem.deterministic and problem.chunk_size > 64:
        return _chunk_elements(problem) >= _FULL_CHUNK
    return _is_big(problem) and (target.arch == "sm_80" or target.kind == "hip")


def _chunk(problem: Problem, target: Target) -> Schedule:
    backward = problem.op == "hsa_backward"
    knobs: dict[str, Knob] = {**_chunk_knobs(problem, target, atomics=True)}
    knobs["segment"] = 512 if problem.group <= 4 else 128
    if problem.group == 1 and target.arch == "sm_90":
        knobs["segment"] = 2048  # 8 % faster than 512 on an H100 at 64K tokens, forward and backward
    knobs["super_tile"] = 0
    if problem.deterministic:
        knobs["super_tile"] = _super_tile(problem)
        if backward:
            knobs["segment"] = 0
    knobs["reduce"] = "slots" if problem.deterministic else "atomic"
    return Schedule.of("chunk", **knobs)


def _super_tile(problem: Problem) -> int:
    """Tokens at a time whose slots are not too many bytes; 0 for all at once."""
    width = problem.head_dim if problem.op == "hsa_backward" else problem.value_dim
    tokens = _SLOT_BYTES // (4 * problem.num_heads * problem.top_k * width)
    if tokens >= problem.batch * problem.seq_len or problem.seq_len <= 1024:
        return 0
    # A super-tile that holds the whole sequence is not one.
    return max(t for t in (1024, 4096) if t == 1024 or t <= min(tokens, problem.seq_len // 2))


def _union(problem: Problem, target: Target) -> Schedule:
    """64 rows, the fewest that the newer matrix instructions take, unless registers run short."""
    backward, full = problem.op == "hsa_backward", _chunk_elements(problem) >= _FULL_CHUNK
    rows = 32 if backward and full and problem.chunk_size > 64 else 64
    if backward and target.kind == "hip" and _is_big(problem):
        rows = 16
    block_tokens = max(1, rows // next_power_of_2(problem.group))
    eight_warps = target.kind == "cuda" and backward and full
    most_stages = 3 if target.arch == "sm_80" and not backward else 2
    if target.arch == "sm_100" and backward:
        most_stages = 1  # a second one spills
    stages = _stages(problem, target, block_tokens, most_stages)
    knobs = {"block_tokens": block_tokens, "num_warps": 8 if eight_warps else 4, "num_stages": stages}
    return Schedule.of("union", **knobs, **_second_pass(problem, target))


def _stages(problem: Problem, target: Target, tokens: int, most: int) -> int:
    fitting = (
        s for s in range(most, 0, -1) if token_shared_memory(problem, target, tokens, s)[1] <= target.shared_memory
    )
    return next(fitting, 1)


def _token(problem: Problem, target: Target) -> Schedule:
    """Registers and spills of the compiled kernels decide the warps, shared memory the stages."""
    hip, wide, backward = target.kind == "hip", problem.itemsize == 4, problem.op == "hsa_backward"
    group = next_power_of_2(problem.group)
    eight_warps = not hip and (group >= 128 or (backward and (_is_big(problem) or group >= 64)))
    most_stages = 1 if wide and (hip or backward) else 2
    if target.arch == "sm_100" and backward:
        most_stages = 1  # a second one spills
    knobs = {"num_warps": 8 if eight_warps else 4, "num_stages": _stages(problem, target, 1, most_stages)}
    return Schedule.of("token", **knobs, **_second_pass(problem, target))


def _second_pass(problem: Problem, target: Target) -> dict[str, Knob]:
    if problem.op != "hsa_backward":
        return {}
    knobs = _chunk_knobs(problem, target, atomics=False)
    return {
        "dk_dv": "apart" if target.arch == "sm_80" and _is_big(problem) else "together",
        "block_entries": knobs["block_entries"],
        "chunk_warps": knobs["num_warps"],
        "chunk_stages": knobs["num_stages"],
    }


def _chunk_knobs(problem: Problem, target: Target, *, atomics: bool) -> dict[str, int]:
    """The largest tile that neither spills nor overflows shared memory."""
    hip, wide, backward = target.kind == "hip", problem.itemsize == 4, problem.op == "hsa_backward"
    group, big = next_power_of_2(problem.group), _is_big(problem)
    full, small = _chunk_elements(problem) >= _FULL_CHUNK, _chunk_elements(problem) <= _SMALL_CHUNK
    if wide or (hip and big and backward):
        most_rows = 16
    elif backward and (hip or target.arch == "sm_80" or big or (full and atomics and problem.chunk_size > 64)):
        most_rows = 32
    else:
        most_rows = 64
    full_on_hip = hip and full and problem.chunk_size > 64
    one_stage = (backward and (wide or big or full_on_hip)) or group > most_rows
    # One pass holds dq's product too, for which Ampere's registers leave no room beside a second stage.
    if backward and atomics and target.arch == "sm_80":
        one_stage |= (full and problem.chunk_size > 64) or (problem.deterministic and not small)
        most_rows = 16 if full and problem.chunk_size > 64 else most_rows
    all_stages: tuple[int, ...] = (1,) if one_stage else (2, 1)
    if target.arch == "sm_100" and not backward and problem.head_dim > 64 and not one_stage:
        all_stages = (3, 2, 1)
    tiles = [(r, s) for r in (64, 32, 16) if r <= most_rows for s in all_stages]
    fitting = (
        (rows, stages)
        for rows, stages in tiles
        if chunk_shared_memory(problem, target, max(rows, group), stages, atomics)[1] <= target.shared_memory
    )
    rows, stages = next(fitting, tiles[-1])
    eight_warps = not hip and (backward or wide or group >= 128)
    if target.arch == "sm_80" and small and not wide and group <= 16:
        eight_warps = False
    return {"block_entries": max(1, rows // group), "num_warps": 8 if eight_warps else 4, "num_stages": stages}


def _is_big(problem: Problem) -> bool:
    """Whether one chunk's keys and values are more than the accumulators of 64 rows leave room for."""
    return _chunk_elements(problem) > _FULL_CHUNK


def _chunk_elements(problem: Problem) -> int:
    """Elements of the keys and values of one chunk."""
    return problem.chunk_size * (problem.head_dim + problem.value_dim)


FORWARD = OpBackend(
    name="triton",
    choices=_FORWARD,
    why_not=_why_not,
    fit=_fit,
    defaults=_defaults,
    work=attention_work,
    passes=attention_passes,
)
BACKWARD = replace(FORWARD, choices=_BACKWARD)
