"""What runs untuned, and the first trial of every search."""

from hsa_compile.errors import InvalidSchedule
from hsa_compile.problem import Problem, next_power_of_2
from hsa_compile.schedules.limits import chunk_shared_memory, token_shared_memory
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace, template_for
from hsa_compile.target import Target

_CPP_ROWS_A_CHUNK = 512  # rows of a chunk's list in one super-tile of the C++ kernels
_BIG_CHUNK = 64 * 256  # elements of keys and values
_FEW_PICKS = 16  # picks a chunk below which chunk-stationary tiles are nearly empty


def default_schedule(problem: Problem, target: Target) -> Schedule:
    """A schedule that is valid and good on any device of its kind, found by rule, without measuring.

    Raises:
        InvalidSchedule: no schedule at all can run the problem on the target; the message says why.
    """
    space = SearchSpace.of(problem, target)
    preferences = _preferences(problem, target)
    for candidate in preferences:
        if space.is_valid(problem, candidate, target):
            return candidate
    if (valid := next(space.schedules(problem, target), None)) is not None:
        return valid
    reason = space.why_invalid(problem, preferences[0], target)
    raise InvalidSchedule(f"no schedule can run {problem.describe()} on {target.arch}: {reason}")


def _preferences(problem: Problem, target: Target) -> list[Schedule]:
    template = template_for(problem, target)
    if template == "cpp":
        return _cpp_preferences(problem)
    if template == "torch":
        return _torch_preferences(problem)
    return _triton_preferences(problem, target)


def _cpp_preferences(problem: Problem) -> list[Schedule]:
    # A chunk is packed once a super-tile: enough rows must follow to pay for it.
    tokens = next_power_of_2(_CPP_ROWS_A_CHUNK // problem.group * max(1, problem.num_chunks) // problem.top_k)
    super_tile = min(max(tokens, 512), 131072, max(512, next_power_of_2(problem.seq_len)))
    more = {"tile_rows": 96} if problem.op == "hsa_backward" else {}
    return [Schedule.of("chunk", super_tile=super_tile, rows=rows, **more) for rows in (24, 16, 12, 8, 6, 4, 3, 2)]


def _torch_preferences(problem: Problem) -> list[Schedule]:
    num_chunks = max(1, problem.num_chunks)
    token = [Schedule.of("token", block_t=block) for block in (64, 16, 4, 1)]
    if problem.seq_len * problem.top_k < _FEW_PICKS * num_chunks and problem.seq_len < num_chunks:
        return token
    tile_rows = max(4096, next_power_of_2(problem.group))
    # Enough tokens that a chunk's list fills a tile, few enough that their rows stay in cache.
    tokens = next_power_of_2(tile_rows // problem.group * num_chunks // problem.top_k)
    limit = next_power_of_2(problem.seq_len)
    preferences = []
    for super_tile in (tokens, limit // 2, limit):
        super_tile = min(max(super_tile, 512), 131072, max(limit // 2, 512))
        rows = min(tile_rows, super_tile * problem.group)
        preferences.append(Schedule.of("chunk", super_tile=super_tile, tile_rows=rows))
    return [*preferences, *token]


def _triton_preferences(problem: Problem, target: Target) -> list[Schedule]:
    token = _triton_token(problem, target)
    if problem.deterministic:
        return [token]
    chunk = Schedule.of("chunk", **_triton_chunk_knobs(problem, target, atomics=True), segment=_segment(problem))
    return [token, chunk] if problem.group >= 64 or problem.seq_len == 1 else [chunk, token]


def _segment(problem: Problem) -> int:
    return max(64, min(1024, 2048 // next_power_of_2(problem.group)))


def _triton_token(problem: Problem, target: Target) -> Schedule:
    """Registers and spills of the compiled kernels decide the warps, shared memory the stages."""
    hip, wide, backward = target.kind == "hip", problem.itemsize == 4, problem.op == "hsa_backward"
    group = next_power_of_2(problem.group)
    eight_warps = not hip and (group >= 128 or (backward and (_is_big(problem) or group >= 64)))
    most_stages = 1 if wide and (hip or backward) else 2 if wide or hip or backward else 3
    fitting = (
        s for s in range(most_stages, 0, -1) if token_shared_memory(problem, target, s)[1] <= target.shared_memory
    )
    knobs = {"num_warps": 8 if eight_warps else 4, "num_stages": next(fitting, 1)}
    if backward:
        second = _triton_chunk_knobs(problem, target, atomics=False)
        knobs |= {
            "block_t": second["block_t"],
            "chunk_warps": second["num_warps"],
            "chunk_stages": second["num_stages"],
        }
    return Schedule.of("token", **knobs)


def _triton_chunk_knobs(problem: Problem, target: Target, *, atomics: bool) -> dict[str, int]:
    """The largest tile that neither spills nor overflows shared memory."""
    hip, wide, backward = target.kind == "hip", problem.itemsize == 4, problem.op == "hsa_backward"
    group, big = next_power_of_2(problem.group), _is_big(problem)
    if wide or (hip and big and backward):
        most_rows = 16
    elif backward and (hip or target.arch == "sm_80" or big):
        most_rows = 32
    else:
        most_rows = 64
    one_stage = (backward and (wide or big)) or group > most_rows
    tiles = [(r, s) for r in (64, 32, 16) if r <= most_rows for s in ((1,) if one_stage else (2, 1))]
    fitting = (
        (rows, stages)
        for rows, stages in tiles
        if chunk_shared_memory(problem, target, max(rows, group), stages, atomics)[1] <= target.shared_memory
    )
    rows, stages = next(fitting, tiles[-1])
    eight_warps = not hip and (backward or wide or group >= 128)
    return {"block_t": max(1, rows // group), "num_warps": 8 if eight_warps else 4, "num_stages": stages}


def _is_big(problem: Problem) -> bool:
    """Whether one chunk's keys and values are more than the accumulators of 64 rows leave room for."""
    return problem.chunk_size * (problem.head_dim + problem.value_dim) > _BIG_CHUNK
