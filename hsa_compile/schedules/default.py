"""What runs untuned, and the first trial of every search."""

from hsa_compile.errors import InvalidSchedule
from hsa_compile.problem import Problem, next_power_of_2
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.target import Target

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
    if target.template == "torch":
        return _torch_preferences(problem)
    return _triton_preferences(problem)


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


def _triton_preferences(problem: Problem) -> list[Schedule]:
    block_t = max(1, 64 // next_power_of_2(problem.group))
    if problem.op == "hsa_forward":
        token = Schedule.of("token", num_warps=4, num_stages=2)
    else:
        token = Schedule.of("token", block_t=block_t, num_warps=4, num_stages=2)
    chunk = Schedule.of("chunk", block_t=block_t, segment=512, num_warps=4, num_stages=2)
    return [token, chunk] if problem.group >= 64 or problem.seq_len == 1 else [chunk, token]
