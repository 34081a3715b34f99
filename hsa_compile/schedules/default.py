"""What runs untuned, and the first trial of every search."""

from hsa_compile.errors import InvalidSchedule
from hsa_compile.problem import Problem, next_power_of_2
from hsa_compile.schedules.hsa_decode import decode_preferences
from hsa_compile.schedules.limits import SMALLEST_CPP_SUPER_TILE, chunk_shared_memory, token_shared_memory
from hsa_compile.schedules.schedule import Knob, Schedule
from hsa_compile.schedules.select_chunks import select_preferences
from hsa_compile.schedules.space import SearchSpace, template_for
from hsa_compile.target import Target

_CPP_ROWS_A_CHUNK = 512  # rows of a chunk's list in one super-tile of the C++ kernels
_SMALL_CHUNK, _FULL_CHUNK = 32 * 128, 64 * 256  # elements of keys and values
_LARGE_GROUP = 64  # heads of a group that fill a matrix instruction without other tokens
_SLOT_BYTES = 1 << 29  # of the slots of one super-tile
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
    if problem.selects:
        return select_preferences(problem, target, template)
    if problem.decodes:
        return decode_preferences(problem, target, template)
    if template == "cpp":
        return _cpp_preferences(problem, target)
    if template == "torch":
        return _torch_preferences(problem)
    return _triton_preferences(problem, target)


def _cpp_preferences(problem: Problem, target: Target) -> list[Schedule]:
    # A chunk is packed once a super-tile: enough rows must follow to pay for it, and yet enough tiles for all cores.
    tokens = next_power_of_2(_CPP_ROWS_A_CHUNK // problem.group * max(1, problem.num_chunks) // problem.top_k)
    shared = problem.batch * problem.num_kv_heads * problem.seq_len // (2 * target.num_cores)
    super_tile = min(max(tokens, 512), 131072, next_power_of_2(max(1, shared)), next_power_of_2(problem.seq_len))
    super_tile = max(super_tile, SMALLEST_CPP_SUPER_TILE)
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
    """By the model of `kernels.md`: a large group fills tiles alone, a middle one with its neighbours, a small one
    only with all that picked a chunk. Where bits must repeat, parts go through slots."""
    token = _triton_token(problem, target)
    chunk = _triton_chunk(problem, target)
    if problem.group >= _LARGE_GROUP or problem.seq_len < _FEW_PICKS:
        return [token, chunk]
    if problem.itemsize != 2:
        return [chunk, token]
    union = _triton_union(problem, target)
    if problem.op == "hsa_backward" and _one_pass_spills(problem, target):
        return [union, token, chunk]
    if next_power_of_2(problem.group) < 16 or (problem.op == "hsa_backward" and not problem.deterministic):
        return [chunk, union, token]
    return [union, chunk, token]


def _one_pass_spills(problem: Problem, target: Target) -> bool:
    """Whether dq, dk and dv of one tile at a time are more than the registers of the target hold."""
    if target.arch == "sm_80" and problem.deterministic and problem.chunk_size > 64:
        return _chunk_elements(problem) >= _FULL_CHUNK
    return _is_big(problem) and (target.arch == "sm_80" or target.kind == "hip")


def _triton_chunk(problem: Problem, target: Target) -> Schedule:
    backward = problem.op == "hsa_backward"
    knobs: dict[str, Knob] = {**_triton_chunk_knobs(problem, target, atomics=True)}
    knobs["segment"] = 512 if problem.group <= 4 else 128
    knobs["super_tile"] = 0
    if problem.deterministic:
        knobs["super_tile"] = _super_tile(problem)
        if backward:
            knobs["segment"] = 0
    knobs["dq" if backward else "reduce"] = "slots" if problem.deterministic else "atomic"
    return Schedule.of("chunk", **knobs)


def _super_tile(problem: Problem) -> int:
    """Tokens at a time whose slots are not too many bytes; 0 for all at once."""
    width = problem.head_dim if problem.op == "hsa_backward" else problem.value_dim
    tokens = _SLOT_BYTES // (4 * problem.num_heads * problem.top_k * width)
    if tokens >= problem.batch * problem.seq_len or problem.seq_len <= 1024:
        return 0
    # A super-tile that holds the whole sequence is not one.
    return max(t for t in (1024, 4096) if t == 1024 or t <= min(tokens, problem.seq_len // 2))


def _triton_union(problem: Problem, target: Target) -> Schedule:
    """64 rows, the fewest that the newer matrix instructions take, unless registers run short."""
    backward, full = problem.op == "hsa_backward", _chunk_elements(problem) >= _FULL_CHUNK
    rows = 32 if backward and full and problem.chunk_size > 64 else 64
    if backward and target.kind == "hip" and _is_big(problem):
        rows = 16
    block_m = max(1, rows // next_power_of_2(problem.group))
    eight_warps = target.kind == "cuda" and backward and full
    stages = _stages(problem, target, block_m, 3 if target.kind == "cuda" and not backward else 2)
    knobs = {"block_m": block_m, "num_warps": 8 if eight_warps else 4, "num_stages": stages}
    return Schedule.of("union", **knobs, **_triton_second_pass(problem, target))


def _stages(problem: Problem, target: Target, tokens: int, most: int) -> int:
    fitting = (
        s for s in range(most, 0, -1) if token_shared_memory(problem, target, tokens, s)[1] <= target.shared_memory
    )
    return next(fitting, 1)


def _triton_token(problem: Problem, target: Target) -> Schedule:
    """Registers and spills of the compiled kernels decide the warps, shared memory the stages."""
    hip, wide, backward = target.kind == "hip", problem.itemsize == 4, problem.op == "hsa_backward"
    group = next_power_of_2(problem.group)
    eight_warps = not hip and (group >= 128 or (backward and (_is_big(problem) or group >= 64)))
    most_stages = 1 if wide and (hip or backward) else 2 if wide or hip or backward else 3
    if target.arch == "sm_100" and backward:
        most_stages = 1  # a second one spills
    knobs = {"num_warps": 8 if eight_warps else 4, "num_stages": _stages(problem, target, 1, most_stages)}
    return Schedule.of("token", **knobs, **_triton_second_pass(problem, target))


def _triton_second_pass(problem: Problem, target: Target) -> dict[str, Knob]:
    if problem.op != "hsa_backward":
        return {}
    knobs = _triton_chunk_knobs(problem, target, atomics=False)
    return {
        "dk_dv": "apart" if target.arch == "sm_80" and _is_big(problem) else "together",
        "block_t": knobs["block_t"],
        "chunk_warps": knobs["num_warps"],
        "chunk_stages": knobs["num_stages"],
    }


def _triton_chunk_knobs(problem: Problem, target: Target, *, atomics: bool) -> dict[str, int]:
    """The largest tile that neither spills nor overflows shared memory."""
    hip, wide, backward = target.kind == "hip", problem.itemsize == 4, problem.op == "hsa_backward"
    group, big = next_power_of_2(problem.group), _is_big(problem)
    full, small = _chunk_elements(problem) >= _FULL_CHUNK, _chunk_elements(problem) <= _SMALL_CHUNK
    if wide or (hip and big and backward):
        most_rows = 16
    elif backward and (hip or target.arch == "sm_80" or big or (full and atomics and target.arch == "sm_90")):
        most_rows = 32
    else:
        most_rows = 64
    one_stage = (backward and (wide or big)) or group > most_rows
    # One pass holds dq's product too: of a chunk of 128 keys, Ampere's registers leave no room for a second stage.
    one_stage |= backward and atomics and full and target.arch == "sm_80" and problem.chunk_size > 64
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
    return {"block_t": max(1, rows // group), "num_warps": 8 if eight_warps else 4, "num_stages": stages}


def _is_big(problem: Problem) -> bool:
    """Whether one chunk's keys and values are more than the accumulators of 64 rows leave room for."""
    return _chunk_elements(problem) > _FULL_CHUNK


def _chunk_elements(problem: Problem) -> int:
    """Elements of the keys and values of one chunk."""
    return problem.chunk_size * (problem.head_dim + problem.value_dim)
