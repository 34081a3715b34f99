"""The schedules of `hsa_attention` in PyTorch, which any CPU runs."""

from hsa_compile.problem import Problem, next_power_of_2
from hsa_compile.schedules.ops.backend import Choices, OpBackend, largest_choice
from hsa_compile.schedules.ops.hsa_attention.cost import attention_work
from hsa_compile.schedules.ops.limits import MAX_GATHER_BYTES, gathered_bytes, why_not_super_tile
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import Target

_SMALLEST_SUPER_TILE = 512  # in tokens; each tile costs the calls of several operators
_FEW_PICKS = 16  # with fewer picks for each chunk, chunk-stationary tiles are nearly empty

_CHOICES: Choices = {
    "chunk": {
        "super_tile": (_SMALLEST_SUPER_TILE, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072),
        "tile_rows": (256, 512, 1024, 2048, 4096, 8192, 16384),
    },
    "token": {"block_tokens": (1, 4, 16, 64, 256)},
}


def _why_not(problem: Problem, schedule: Schedule, target: Target) -> str | None:
    if schedule.dataflow == "token":
        gathered = schedule.number("block_tokens") * gathered_bytes(problem)
        if schedule.number("block_tokens") != 1 and gathered > MAX_GATHER_BYTES:
            return f"a block of {schedule['block_tokens']} tokens gathers {gathered} bytes, at most {MAX_GATHER_BYTES}"
        if schedule.number("block_tokens") > next_power_of_2(problem.seq_len):
            return f"block_tokens = {schedule['block_tokens']} is more than the {problem.seq_len} tokens there are"
        return None
    if schedule.number("tile_rows") < problem.group:
        return f"tile_rows = {schedule['tile_rows']} is less than the {problem.group} rows of one token"
    if schedule.number("tile_rows") > schedule.number("super_tile") * problem.group:
        return f"tile_rows = {schedule['tile_rows']} is more than the rows of a super-tile"
    return why_not_super_tile(problem, schedule, _SMALLEST_SUPER_TILE)


def _fit(problem: Problem, schedule: Schedule) -> Schedule:
    tokens, knobs = next_power_of_2(problem.seq_len), _CHOICES[schedule.dataflow]
    if schedule.dataflow == "token":
        most = min(tokens, MAX_GATHER_BYTES // gathered_bytes(problem))
        return Schedule.of(
            "token", block_tokens=largest_choice(knobs["block_tokens"], schedule.number("block_tokens"), most)
        )
    super_tile = largest_choice(knobs["super_tile"], schedule.number("super_tile"), tokens)
    tile_rows = largest_choice(knobs["tile_rows"], schedule.number("tile_rows"), super_tile * problem.group)
    return Schedule.of("chunk", super_tile=super_tile, tile_rows=tile_rows)


def _defaults(problem: Problem, target: Target) -> list[Schedule]:
    num_chunks = max(1, problem.num_chunks)
    token = [Schedule.of("token", block_tokens=block) for block in (64, 16, 4, 1)]
    if problem.seq_len * problem.top_k < _FEW_PICKS * num_chunks and problem.seq_len < num_chunks:
        return token
    tile_rows = max(4096, next_power_of_2(problem.group))
    # There are enough tokens that a chunk's list fills a tile, and few enough that their rows stay in cache.
    tokens = next_power_of_2(tile_rows // problem.group * num_chunks // problem.top_k)
    limit = next_power_of_2(problem.seq_len)
    preferences = []
    for super_tile in (tokens, limit // 2, limit):
        super_tile = min(max(super_tile, 512), 131072, max(limit // 2, 512))
        rows = min(tile_rows, super_tile * problem.group)
        preferences.append(Schedule.of("chunk", super_tile=super_tile, tile_rows=rows))
    return [*preferences, *token]


FORWARD = BACKWARD = OpBackend(
    name="torch", choices=_CHOICES, why_not=_why_not, fit=_fit, defaults=_defaults, work=attention_work
)
