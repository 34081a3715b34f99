"""The schedules of `hsa_attention` in C++, for a CPU that has a compiler."""

from dataclasses import replace

from hsa_compile.problem import Problem, next_power_of_2
from hsa_compile.schedules.ops.backend import Knobs, OpBackend, largest_choice
from hsa_compile.schedules.ops.hsa_attention.cost import attention_work
from hsa_compile.schedules.ops.limits import why_not_rows, why_not_super_tile
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import Target

_SMALLEST_SUPER_TILE = 128  # in tokens
_ROWS_A_CHUNK = 512  # how many rows a chunk's list should have in one super-tile

_FORWARD: Knobs = {
    "super_tile": (_SMALLEST_SUPER_TILE, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072),
    "rows": (2, 3, 4, 6, 8, 12, 16, 24),
}
_BACKWARD: Knobs = {**_FORWARD, "tile_rows": (48, 96, 192, 384)}


def _why_not(problem: Problem, schedule: Schedule, target: Target) -> str | None:
    sizes = [problem.chunk_size, problem.value_dim]
    if problem.op == "hsa_backward":
        sizes.append(problem.head_dim)
    reason = why_not_rows(schedule, target, sizes)
    return reason or why_not_super_tile(problem, schedule, _SMALLEST_SUPER_TILE)


def _fit(problem: Problem, schedule: Schedule) -> Schedule:
    tokens = next_power_of_2(problem.seq_len)
    super_tile = largest_choice(_FORWARD["super_tile"], schedule.number("super_tile"), tokens)
    return Schedule.from_dict({**schedule, "super_tile": super_tile})


def _defaults(problem: Problem, target: Target) -> list[Schedule]:
    # A chunk is packed once a super-tile: enough rows must follow to pay for it, and yet enough tiles for all cores.
    tokens = next_power_of_2(_ROWS_A_CHUNK // problem.group * max(1, problem.num_chunks) // problem.top_k)
    shared = problem.batch * problem.num_kv_heads * problem.seq_len // (2 * target.num_cores)
    super_tile = min(max(tokens, 512), 131072, next_power_of_2(max(1, shared)), next_power_of_2(problem.seq_len))
    super_tile = max(super_tile, _SMALLEST_SUPER_TILE)
    more = {"tile_rows": 96} if problem.op == "hsa_backward" else {}
    return [Schedule.of("chunk", super_tile=super_tile, rows=rows, **more) for rows in (24, 16, 12, 8, 6, 4, 3, 2)]


FORWARD = OpBackend(
    name="cpp",
    choices={"chunk": _FORWARD},
    why_not=_why_not,
    fit=_fit,
    defaults=_defaults,
    work=attention_work,
)
BACKWARD = replace(FORWARD, choices={"chunk": _BACKWARD})
